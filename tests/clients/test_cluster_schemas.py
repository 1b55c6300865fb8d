"""The file for Kubernetes is what Kubeflow accepts, by its own schema: `bash scripts/test.sh --clients`."""

import yaml
from workspace import ROOT

FOLDER = ROOT / "scripts" / "cluster"


def test_kubeflow():
    from kubeflow_trainer_api.models import TrainerV1alpha1TrainJob

    content = yaml.safe_load((FOLDER / "trainjob.yaml").read_text())
    job = TrainerV1alpha1TrainJob.from_dict(content)
    understood = job.to_dict()
    assert understood["spec"] == content["spec"]  # nothing is unknown to it and left out
