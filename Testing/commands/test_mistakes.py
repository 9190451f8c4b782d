"""A mistake on the command line: one sentence on standard error that names it, and status 2."""

import argparse
import importlib

import pytest

from GradProjIOLib.commands.main import VERBS, main
from GradProjIOLib.commands.parser import Parser
from GradProjIOLib.errors import InputError

PAIR = ["register", "fixed.nii", "moving.nii"]
MISTAKES = [
    ([], ["VERB", "gradprojio --help"]),
    (["regster"], ["'regster'", "did you mean register?"]),
    (["quux"], ["'quux'", "choose one of register, warp"]),
    (["--verion"], ["--verion", "did you mean --version?"]),
    (["register"], ["FIXED, MOVING, -o/--output", "gradprojio register --help"]),
    (["register", "--from", "result"], ["required: -o/--output"]),
    ([*PAIR, "-o", "out", "--stpes", "5"], ["--stpes", "did you mean --steps?"]),
    ([*PAIR, "-o", "out", "--stpes=5"], ["--stpes", "did you mean --steps?"]),
    ([*PAIR, "-o", "out", "--step", "5"], ["--step ", "did you mean --steps?"]),
    ([*PAIR, "--outptu", "out"], ["--outptu", "did you mean --output?"]),
    ([*PAIR, "-o", "out", "-z"], ["'-z'"]),
    ([*PAIR, "-o", "out", "third.nii"], ["'third.nii'"]),
    ([*PAIR, "-o", "out", "--steps"], ["--steps", "expected one argument"]),
    ([*PAIR, "-o", "out", "--steps", "many"], ["--steps", "'many'", "whole number"]),
    ([*PAIR, "-o", "out", "--steps", "-5"], ["steps", "-5", "0 or more"]),
    ([*PAIR, "-o", "out", "--seed", "4294967296"], ["seed", "0 to 4294967295"]),
    ([*PAIR, "-o", "out", "--regularity-weight", "much"], ["--regularity-weight", "'much'", "number"]),
    ([*PAIR, "-o", "out", "--learning-rate", "nan"], ["learning rate", "nan", "more than 0"]),
    ([*PAIR, "-o", "out", "--lattice", "32", "32"], ["--lattice", "3 arguments"]),
    ([*PAIR, "-o", "out", "--lattice", "32", "32", "8"], ["lattice", "16 or more"]),
    ([*PAIR, "-o", "out", "--model", "compct"], ["--model", "'compct'", "did you mean compact?"]),
    ([*PAIR, "-o", "out", "--method", "best"], ["--method", "'best'", "projected, vanilla, direct"]),
    ([*PAIR, "-o", "out", "--align", "rigid", "--initial-transform", "a.h5"], ["--initial-transform", "--align rigid"]),
    ([*PAIR, "-o", __file__], ["--output", __file__]),
    (["models", "lsit"], ["'lsit'", "did you mean list?"]),
    (["models", "path", "compct"], ["'compct'", "did you mean compact?"]),
    (["lumir"], ["VERB", "gradprojio lumir --help"]),
    (["lumir", "register", "data", "-o", "fields.tar"], ["--output", "fields.tar"]),
    (["warp", "a.nii", "b.h5", "-r", "c.nii", "-o", "d.nii", "--interpolation", "liner"], ["'liner'", "linear?"]),
    (["jacobian", "a.h5"], ["-r/--reference"]),
    (["demo", "--size", "3"], ["--size", "3", "16 or more"]),
    (["batch", "pairs.csv", "-o", "out", "--workers", "0"], ["--workers", "0", "1 or more"]),
    (["batch", "pairs.csv", "-o", "out", "--workers", "1", "--scheduler", "a"], ["--scheduler", "--workers"]),
    (["compare", "pairs.csv", "-o", "out", "--every", "0"], ["--every", "0", "1 or more"]),
    (["evaluate", "result", "--structures", "1,a"], ["--structures", "'a'", "whole number"]),
    (["train", "-o", "out"], ["DATA", "--synthetic"]),
]


def refused(arguments, capsys):
    """The line on standard error of a command that ends with status 2 and prints nothing else."""
    status = main(arguments)
    printed = capsys.readouterr()
    assert status == 2
    assert printed.out == ""
    assert printed.err.startswith("gradprojio: ")
    assert printed.err.count("\n") == 1
    return printed.err


@pytest.mark.parametrize(("arguments", "words"), MISTAKES, ids=lambda value: " ".join(value)[:60])
def test_a_mistake_is_one_line_that_names_it(arguments, words, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    said = refused(arguments, capsys)
    assert all(word in said for word in words), said
    assert not list(tmp_path.iterdir())


def arguments_of(verb):
    """The parser of a verb, and of each of its own verbs."""
    parser = Parser(prog=f"gradprojio {verb}")
    importlib.import_module(f"GradProjIOLib.commands.{verb}").add_arguments(parser)
    yield parser
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            yield from action.choices.values()


@pytest.mark.parametrize("verb", VERBS)
def test_an_unknown_option_is_named_by_every_verb(verb, capsys):
    assert "--helb is not known; did you mean --help?" in refused([verb, "--helb"], capsys)


@pytest.mark.parametrize("verb", VERBS)
def test_every_option_is_recognized_when_its_last_letter_is_missing(verb):
    for parser in arguments_of(verb):
        for option in [option for option in parser._option_string_actions if option.startswith("--")]:
            with pytest.raises(InputError, match=rf"{option[:-1]} is not known; did you mean {option}\?"):
                parser.parse_args([option[:-1]])


@pytest.mark.parametrize("verb", VERBS)
def test_the_help_of_every_verb_explains_each_argument_and_says_its_default(verb, capsys):
    with pytest.raises(SystemExit) as end:
        main([verb, "--help"])
    assert end.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    assert text.startswith(f"usage: gradprojio {verb} ")
    assert "default: None" not in text
    for parser in arguments_of(verb):
        for action in parser._actions:
            assert action.help or isinstance(action, argparse._SubParsersAction), action.dest


def test_what_follows_two_dashes_is_no_option(capsys, tmp_path):
    said = refused(["register", "-o", str(tmp_path / "out"), "--", "--fixed.nii", "--moving.nii"], capsys)
    assert "--fixed.nii" in said
    assert "did you mean" not in said
