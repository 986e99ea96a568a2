"""When each step of a run was under way: what its report draws and lists."""

from datetime import UTC, datetime, timedelta

from pd_deploy.steps.timeline import SERVE, WAY_BACK, Timeline, Took, tables, waterfall

T0 = datetime(2026, 1, 1, tzinfo=UTC)


def at(seconds: float) -> datetime:
    return T0 + timedelta(seconds=seconds)


def took(verb: str, subject: str, phase: str, begin: float, end: float, **more: object) -> Took:
    return Took(verb, subject, phase, at(begin), at(end), **more)  # type: ignore[arg-type]


STEPS = Timeline(
    [
        took("preflight", "b", "prepare", 0, 10),
        took("preflight", "a", "prepare", 0, 5),
        took("clean up", "c0", "cut-over", 20, 30, changed=True),
        took("ready", "p0", SERVE, 30, 40, detail="died | badly", failed=True),
        took("ready", "p0", WAY_BACK, 40, 80),
    ]
)


def test_phases_and_kinds_of_steps_have_bars_on_one_scale() -> None:
    assert waterfall(STEPS, (at(25), at(90)), width=8) == [
        "prepare            10.0 s  █",
        "  preflight ×2     10.0 s  ░",
        "cut-over           10.0 s    █",
        "  clean up         10.0 s    ░",
        "serve              10.0 s     █",
        "  ready ✗          10.0 s     ░",
        "way back           40.0 s      ████",
        "  ready            40.0 s      ░░░░",
        "down               55.0 s    ▓▓▓▓▓▓",
    ]
    assert waterfall(Timeline()) == []
    assert waterfall(Timeline([took("plan", "", "look", 0, 0)])) == [
        "look        0.0 s  █",
        "  plan      0.0 s  ░",
    ]


def test_each_phase_has_a_table_of_its_steps_and_why_they_failed() -> None:
    lines = tables(STEPS)
    titles = [line for line in lines if line.startswith("#")]
    assert titles == [
        "### Prepare, 10.0 s", "### Cut-over, 10.0 s", "### Serve, 10.0 s", "### Way back, 40.0 s"
    ]  # fmt: skip
    assert "| clean up | c0 | yes |  | 10.0 |" in lines
    assert "| ready | p0 |  | **failed:** died \\| badly | 10.0 |" in lines


def test_tasks_are_named_after_their_phase_and_the_way_back_is_one_phase() -> None:
    timeline = Timeline()
    assert timeline.prefix == ""
    timeline.enter(SERVE)
    assert timeline.prefix == "serve: "
    timeline.enter(WAY_BACK)
    timeline.enter(SERVE)
    assert (timeline.phase, timeline.prefix) == (WAY_BACK, "way back: ")
