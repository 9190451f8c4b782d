"""The settings: what they accept, what they refuse, and that the command line offers all of them."""

import argparse
import json
import math
from dataclasses import asdict, fields
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import settings as property_test
from hypothesis import strategies as st

from GradProjIOLib.commands.main import VERBS
from GradProjIOLib.commands.options import add_setting_options, settings_from
from GradProjIOLib.commands.parser import Parser
from GradProjIOLib.errors import InputError
from GradProjIOLib.settings import (
    LARGEST_SEED,
    PRESETS,
    SETTING_NAMES,
    SMALLEST_LATTICE,
    Settings,
    preset_of,
)

KINDS = {one.name: one.metadata["kind"] for one in fields(Settings)}
CHOICES = {one.name: one.metadata["choices"] for one in fields(Settings) if one.metadata["choices"]}
POSITIVE = st.floats(min_value=0, exclude_min=True, allow_infinity=False)
SAMPLES = st.integers(SMALLEST_LATTICE, 1000)
VALID = {
    **{name: st.sampled_from(choices) for name, choices in CHOICES.items()},
    "weights": st.none() | st.text(),
    "steps": st.integers(min_value=0, max_value=10**9),
    "refine_steps": st.integers(min_value=0, max_value=10**9),
    "resolution": st.none() | POSITIVE,
    "samples": st.integers(1000, 10**9),
    "regularity_weight": st.just(0.0) | POSITIVE,
    "landmark_tolerance": POSITIVE,
    "learning_rate": st.none() | POSITIVE,
    "seed": st.integers(0, LARGEST_SEED),
    "device": st.text(),
    "lattice": st.none() | st.tuples(SAMPLES, SAMPLES, SAMPLES),
}
NO_NUMBER = st.sampled_from([True, "5", b"5", None, math.nan, math.inf, -math.inf, 10**400, [5], 5j, np.True_])
NEGATIVE = st.floats(max_value=0, exclude_max=True)
INVALID = {
    **{
        name: st.text().filter(lambda word, known=choices: word not in known) | st.sampled_from([None, 5, True, [], {}])
        for name, choices in CHOICES.items()
    },
    "weights": st.integers() | st.booleans() | st.just([]),
    "steps": NO_NUMBER | st.integers(max_value=-1) | st.floats(),
    "refine_steps": NO_NUMBER | st.integers(max_value=-1) | st.floats(),
    "samples": NO_NUMBER | st.integers(max_value=999) | st.floats(),
    "resolution": NO_NUMBER.filter(lambda value: value is not None) | NEGATIVE | st.just(0),
    "regularity_weight": NO_NUMBER | NEGATIVE,
    "landmark_tolerance": NO_NUMBER | NEGATIVE | st.just(0),
    "learning_rate": NO_NUMBER.filter(lambda value: value is not None) | NEGATIVE | st.just(0),
    "seed": NO_NUMBER | st.integers(max_value=-1) | st.integers(min_value=LARGEST_SEED + 1) | st.floats(),
    "device": st.integers() | st.booleans() | st.none(),
    "lattice": st.sampled_from(["32", "323232", 32, True, (32.0, 32, 32), (True, 32, 32), ("32", 32, 32), {}])
    | st.lists(SAMPLES, max_size=5).filter(lambda samples: len(samples) != 3)
    | st.tuples(SAMPLES, st.integers(max_value=SMALLEST_LATTICE - 1), SAMPLES),
}


def test_every_setting_is_tried_below():
    assert set(VALID) == set(INVALID) == set(SETTING_NAMES)


@pytest.mark.parametrize("one", fields(Settings), ids=lambda one: one.name)
def test_every_default_is_valid_and_explained(one):
    assert getattr(Settings(**{one.name: one.default}), one.name) == one.default
    assert one.metadata["help"]


@property_test(deadline=None)
@given(st.fixed_dictionaries({}, optional=VALID))
def test_valid_settings_come_back_from_json_as_they_were(values):
    settings = Settings(**values)
    for name, value in values.items():
        assert getattr(settings, name) == value
        assert value is None or type(getattr(settings, name)) is KINDS[name]
    assert Settings.from_mapping(json.loads(json.dumps(asdict(settings)))) == settings


@property_test(deadline=None)
@given(st.data(), st.sampled_from(SETTING_NAMES))
def test_every_other_value_is_refused_in_one_sentence_that_names_the_setting(data, name):
    value = data.draw(INVALID[name])
    with pytest.raises(InputError) as error:
        Settings(**{name: value})
    sentence = str(error.value)
    assert name.replace("_", " ") in sentence
    assert "\n" not in sentence
    assert sentence.endswith((".", "?"))


def test_numbers_of_numpy_and_torch_are_numbers():
    settings = Settings(
        steps=np.int64(7), regularity_weight=torch.tensor(0.5), learning_rate=np.float32(1), lattice=np.full(3, 32)
    )
    assert settings == Settings(steps=7, regularity_weight=0.5, learning_rate=1.0, lattice=(32, 32, 32))
    assert json.dumps(asdict(settings))
    with pytest.raises(InputError, match="steps"):
        Settings(steps=np.array([3, 4]))


def test_a_path_may_stand_for_the_weights_only():
    assert Settings(weights=Path("a.pt")).weights == "a.pt"
    with pytest.raises(InputError, match="device"):
        Settings(device=Path("cpu"))


def test_a_misspelled_name_or_choice_brings_a_suggestion():
    with pytest.raises(InputError, match=r"'stpes' is not known; did you mean steps\?"):
        Settings.from_mapping({"stpes": 5})
    with pytest.raises(InputError, match=r"model cannot be 'compct'; did you mean compact\?"):
        Settings(model="compct")
    with pytest.raises(InputError, match=r"'quux' is not known; choose one of preset, model, .*memory\."):
        Settings.from_mapping({"quux": 5})


class TestCommandLine:
    def parser(self, **options):
        parser = Parser()
        add_setting_options(parser, **options)
        return parser

    def test_it_offers_exactly_the_settings(self):
        assert vars(self.parser().parse_args([])) == {}
        assert settings_from(self.parser().parse_args([])) == Settings()
        assert self.offered() == {"preset", *SETTING_NAMES}
        others = [name for name in SETTING_NAMES if name != "steps"]
        assert self.offered(only=others) == {"preset", *others}
        assert self.offered(only=("seed",)) == {"preset", "seed"}

    def offered(self, **options):
        return {action.dest for action in self.parser(**options)._actions} - {"help"}

    @pytest.mark.parametrize("preset", PRESETS)
    def test_a_preset_gives_what_is_not_typed(self, preset):
        found = settings_from(self.parser().parse_args(["--preset", preset, "--seed", "3", "--refine-steps", "60"]))
        assert found == Settings(**(PRESETS[preset] | {"seed": 3, "refine_steps": 60}))
        assert preset_of(settings_from(self.parser().parse_args(["--preset", preset]))) == preset
        assert preset_of(Settings(steps=7)) == preset_of(Settings(resolution=1.0)) == "custom"

    @pytest.mark.parametrize("one", fields(Settings), ids=lambda one: one.name)
    def test_its_help_tells_default_choices_and_range(self, one):
        text = " ".join(self.parser(only=(one.name,)).format_help().split())
        assert one.metadata["help"] in text
        assert (f"(default: {one.default})" in text) == (one.default is not None)
        for bound in ("least", "above", "most"):
            assert one.metadata[bound] is None or str(one.metadata[bound]) in text
        assert all(choice in text for choice in one.metadata["choices"])

    @property_test(deadline=None)
    @given(st.fixed_dictionaries({}, optional={**VALID, "weights": st.just("a.pt"), "device": st.just("cpu")}))
    def test_it_gives_the_settings_that_were_typed(self, values):
        words = []
        for name, value in values.items():
            if value is not None:
                texts = map(str, value) if isinstance(value, tuple) else [str(value)]
                words += [f"--{name.replace('_', '-')}", *texts]
        assert settings_from(self.parser().parse_args(words)) == Settings(**values)

    def test_no_verb_repeats_a_setting(self):
        """A verb's file names no option of a setting; `train` has options of its own for how to train."""
        for verb in set(VERBS) - {"train"}:
            text = (Path(__file__).parents[1] / "GradProjIOLib" / "commands" / f"{verb}.py").read_text("utf-8")
            for name in SETTING_NAMES:
                assert f'"--{name.replace("_", "-")}"' not in text, verb

    def test_settings_a_verb_lacks_have_their_defaults(self):
        assert settings_from(argparse.Namespace(steps=3, quiet=True)) == Settings(steps=3)
