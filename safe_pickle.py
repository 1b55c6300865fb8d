"""Loads pickles of plain data only. A pickle is a program; this reader refuses to run any that asks for more."""

import pickle
from pathlib import Path

from utils import InputError


class RestrictedUnpickler(pickle.Unpickler):
    """Loads plain containers, numbers and numpy arrays; refuses every other name, so that no code can run."""

    ALLOWED = {
        ("numpy", "ndarray"),
        ("numpy", "dtype"),
        ("_codecs", "encode"),  # how protocol 2 writes bytes
    } | {
        (module, name)
        for package in ("numpy.core", "numpy._core")
        for module, name in (
            (f"{package}.multiarray", "_reconstruct"),
            (f"{package}.multiarray", "scalar"),
            (f"{package}.numeric", "_frombuffer"),
        )
    }

    def find_class(self, module: str, name: str):
        if (module, name) not in self.ALLOWED:
            raise InputError(f"it asks for {module}.{name}, which is not data; it could run code and was not loaded")
        return super().find_class(module, name)


def load_plain_pickle(path: str | Path):
    """A pickle of plain containers, numbers and numpy arrays. Raises: InputError if it is anything else."""
    path = Path(path)
    if not path.is_file():
        raise InputError(f"{path} is no file.")
    with open(path, "rb") as file:
        try:
            return RestrictedUnpickler(file).load()
        except InputError as error:
            raise InputError(f"{path} was refused: {error}.") from None
        except Exception as error:  # a pickle of garbage can raise nearly anything
            reason = " ".join(str(error).split()).rstrip(".")  # some span lines
            raise InputError(f"{path} is not a pickle, or cut short ({type(error).__name__}: {reason}).") from None
