"""The progress bar tells the time that the steps to come will take."""

from GradProjIOLib.engine.optimization import Step
from GradProjIOLib.registration.progress import Progress


def test_the_time_before_the_first_step_does_not_count_for_the_rest():
    with Progress(100, shown=True) as progress:
        # As if the images had taken an hour to read and align.
        progress.bar.start_t -= 3600
        progress.bar.last_print_t -= 3600
        progress.restart()
        progress.show(Step(0, -0.5, 0.1, 0.2, "none", 1.0))
        assert progress.bar.format_dict["elapsed"] < 3600


def test_steps_that_did_not_fit_into_memory_do_not_count():
    with Progress(100, shown=True) as progress:
        for _ in range(2):
            progress.restart()
            for index in range(3):
                progress.show(Step(index, -0.5, 0.1, -0.2, "similarity", 1.0))
        assert progress.bar.n == 3
        assert progress.conflicts == 3
