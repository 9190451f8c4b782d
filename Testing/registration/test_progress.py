"""The progress bar tells the time that the steps to come will take."""

from GradProjIOLib.engine.optimization import Step
from GradProjIOLib.registration.progress import Progress, RemainingTime


def test_the_time_before_the_first_step_does_not_count_for_the_rest():
    with Progress(total=100) as progress:
        # As if the images had taken an hour to read and align.
        progress.start_t -= 3600
        progress.last_print_t -= 3600
        progress.restart()
        progress.show(Step(0, -0.5, 0.1, 0.0, 0.2, "none", 1.0))
        assert progress.format_dict["elapsed"] < 3600


def test_steps_that_did_not_fit_into_memory_do_not_count():
    with Progress(total=100) as progress:
        for _ in range(2):
            progress.restart()
            for index in range(3):
                progress.show(Step(index, -0.5, 0.1, 0.0, -0.2, "similarity", 1.0))
        assert progress.n == 3
        assert progress.conflicts == 3


def test_the_remaining_time_follows_what_a_step_of_each_part_costs():
    remaining = RemainingTime([10.0, 10.0, 1.0, 1.0, 1.0, 8.0])
    # A unit of cost takes half a second at first.
    assert [remaining.after(5.0) for _ in range(2)] == [0.5 * (10 + 3 + 8), 0.5 * (3 + 8)]
    # Then twice as long as was thought.
    assert [remaining.after(1.0) for _ in range(3)] == [2 + 8, 1 + 8, 8]
    assert remaining.after(8.0) == 0


def test_a_step_that_was_slow_by_chance_is_soon_forgotten():
    remaining = RemainingTime([1.0] * 20)
    remaining.after(100.0)
    assert [remaining.after(1.0) for _ in range(9)][-1] == 10.0
