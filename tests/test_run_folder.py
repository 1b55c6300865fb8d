"""What a run notes of the code that made it."""

from training.run_folder import git_log


def test_git_log_of_a_folder_without_git_is_empty(tmp_path):
    assert set(git_log(tmp_path).values()) == {None}
