"""One tiny LeRobot folder for all verbs, and a way to run a verb and read its JSON."""

import json

import pytest

from vivace.checkpoints.make import Recipe, make_checkpoint
from vivace.cli.main import main


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint") / "tiny"
    make_checkpoint(folder, Recipe(size="tiny", horizon=6))
    return folder


@pytest.fixture
def vivace(capsys):
    """vivace("check", path) -> (exit code, JSON on stdout or None, text on stderr)."""

    def call(*arguments):
        capsys.readouterr()
        code = main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return code, json.loads(captured.out) if captured.out.strip() else None, captured.err

    return call
