from __future__ import annotations

import json

from tests.report import example

from parco.report import chart


def test_every_plan_and_every_uniform_choice_is_a_mark():
    result = example.result()
    traces = {trace["name"]: trace for trace in chart.frontier(result)["traces"]}
    assert traces["predicted"]["x"] == [point["fraction"] for point in result["frontier"]]
    assert traces["measured"]["y"] == [p["measured_loss"] for p in result["frontier"] if p["measured_loss"] is not None]
    assert traces["uniform, healed"]["y"] == [row["kl"] for row in result["alternatives"] if not row["chosen"]]


def test_nothing_is_called_healed_that_was_not():
    result = example.result()
    result["heal"] = None
    for point in result["frontier"]:
        point["healed_loss"] = None
    for row in result["alternatives"]:
        row["healed_steps"] = 0
    traces = chart.frontier(result)["traces"]
    assert "uniform" in {trace["name"] for trace in traces}
    assert not [text for trace in traces for text in (trace["name"], *trace["text"]) if "healed" in text]


def test_the_chosen_plan_is_ringed_at_its_latest_measurement():
    result = example.result()
    traces = {trace["name"]: trace for trace in chart.frontier(result)["traces"]}
    assert traces["chosen plan"]["y"] == [0.0139, 0.0141]


def test_hovering_names_the_plan_and_escapes_what_came_from_outside():
    result = example.result()
    result["frontier"][0]["name"] = "<i>size"
    text = chart.frontier(result)["traces"][0]["text"][0]
    assert "&lt;i&gt;size" in text
    assert "int5:64 x 4" in text
    assert "(predicted)" in text


def test_colour_is_the_time_of_a_token_in_milliseconds():
    result = example.result()
    drawn = chart.frontier(result)
    measured = [p["measured_decode_seconds"] for p in result["frontier"] if p["measured_decode_seconds"]]
    trace = next(trace for trace in drawn["traces"] if trace["name"] == "measured")
    assert trace["seconds"] == [1e3 * seconds for seconds in measured]
    assert drawn["seconds"][0] <= min(trace["seconds"]) <= max(trace["seconds"]) <= drawn["seconds"][1]


def test_an_axis_with_a_loss_of_zero_is_linear():
    result = example.result()
    assert chart.frontier(result)["y_axis"]["type"] == "log"
    result["frontier"][-1]["predicted_loss"] = 0.0
    assert "type" not in chart.frontier(result)["y_axis"]


def test_without_plans_there_is_nothing_to_draw_and_it_is_still_json():
    result = example.result()
    result["frontier"], result["alternatives"] = [], []
    assert json.loads(json.dumps(chart.frontier(result)))["traces"] == []


def test_a_target_in_bytes_is_a_line():
    result = example.result()
    assert chart.frontier(result)["shapes"][0]["x0"] == 0.35
    result["target"]["kind"] = "loss"
    assert chart.frontier(result)["shapes"] == []
