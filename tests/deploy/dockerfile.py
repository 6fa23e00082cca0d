"""Reads a Dockerfile of the plain kind: instructions in order, stages, JSON and shell forms. No heredocs."""

import json
import re
from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True)
class Instruction:
    """One instruction, continuation lines joined."""

    name: str
    rest: str

    @property
    def options(self) -> dict[str, str]:
        """`--name=value` before the arguments."""
        return dict(re.findall(r"(?:^|(?<=\s))--([\w-]+)=(\S+)", self.rest))

    @property
    def words(self) -> list[str]:
        """The arguments without options; those of the JSON form as they are."""
        plain = re.sub(r"(?:^|(?<=\s))--[\w-]+=\S+\s*", "", self.rest).strip()
        return json.loads(plain) if plain.startswith("[") else plain.split()


@dataclass
class Stage:
    """From one FROM to the next."""

    name: str
    base: str
    instructions: list[Instruction] = field(default_factory=list)

    def all(self, name: str) -> list[Instruction]:
        return [found for found in self.instructions if found.name == name]

    def environment(self) -> dict[str, str]:
        """What ENV sets."""
        return dict(word.split("=", 1) for found in self.all("ENV") for word in found.words)


def read(path: Path) -> list[Stage]:
    """The stages of a Dockerfile, in order."""
    kept = [line for line in path.read_text().splitlines() if not line.startswith("#")]
    stages: list[Stage] = []
    for line in "\n".join(kept).replace("\\\n", " ").splitlines():
        name, _, rest = line.strip().partition(" ")
        if name == "FROM":
            base, *alias = rest.split(" AS ")
            stages.append(Stage(alias[0] if alias else "", base))
        elif name and stages:
            stages[-1].instructions.append(Instruction(name, rest.strip()))
    return stages
