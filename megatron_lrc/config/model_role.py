"""How errors name a model of whom config.json and weights are read: by what it is for, and by the flag that gave it."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class ModelRole:
    """noun: as in "the teacher's 9 attention heads". flag: as in "--teacher DIR holds no config.json"."""

    noun: str
    flag: str


TEACHER = ModelRole("teacher", "--teacher")
STUDENT = ModelRole("model", "--student")  # ordinary training goes on from it, and there is no teacher
CONVERTED = ModelRole("teacher", "--hf-model")  # what tools/convert_from_hf.py makes a teacher of
