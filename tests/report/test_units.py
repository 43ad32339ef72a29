import pytest

from parco.report import units


@pytest.mark.parametrize(
    ("nbytes", "text"),
    [(0, "0 B"), (999, "999 B"), (1000, "1.00 kB"), (9_398_700, "9.40 MB"), (27e6, "27.0 MB"), (2.2e9, "2.20 GB")],
)
def test_bytes_have_three_digits_and_a_decimal_unit(nbytes: float, text: str):
    assert units.size(nbytes) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0 s"),
        (3e-8, "30.0 ns"),
        (4.4e-5, "44.0 µs"),
        (4.18e-3, "4.18 ms"),
        (12.34, "12.3 s"),
        (125, "2 min 5 s"),
        (5400, "1 h 30 min"),
    ],
)
def test_durations_change_unit_with_their_size(seconds: float, text: str):
    assert units.duration(seconds) == text


@pytest.mark.parametrize(
    ("difference", "text"), [(0.0175, "+0.0175"), (-0.002, "-0.0020"), (2.1e-4, "+2.1e-04"), (0.0, "+0.0000")]
)
def test_a_rise_in_loss_keeps_its_sign_and_small_ones_their_digits(difference: float, text: str):
    assert units.rise(difference) == text


@pytest.mark.parametrize(
    ("value", "text"), [(9.996, "10.0"), (99.96, "100"), (4099.6, "4,100"), (0.03481, "0.0348"), (float("inf"), "inf")]
)
def test_significant_rounds_before_it_counts_digits(value: float, text: str):
    assert units.significant(value) == text


def test_a_loss_that_is_almost_nothing_is_not_called_nothing():
    assert [units.nats(loss) for loss in (0.0, 1.23e-6, 0.0139)] == ["0.0000", "1.2e-06", "0.0139"]


def test_what_was_not_measured_is_said_to_be_so():
    measures = (units.size, units.duration, units.nats, units.rise, units.percent, units.speed)
    assert {measure(None) for measure in measures} == {"not measured"}
