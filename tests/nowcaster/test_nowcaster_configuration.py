"""A configuration is what it says or an error that says why not."""

import json

import pytest

from hf_nino.nowcaster import NowcasterConfig


def test_round_trip_through_json():
    """from_dict(to_dict()) is the same configuration, also through JSON."""
    config = NowcasterConfig(nowcaster_type="wnn", hidden_size=32, activation="gelu", meta_trained_on="two tasks")
    assert NowcasterConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    assert config != NowcasterConfig()


def test_defaults_are_the_original_release():
    """Sizes of the published checkpoints."""
    config = NowcasterConfig()
    assert (config.context, config.hidden_size, config.num_layers, config.max_horizon) == (5, 128, 3, 40)
    assert (config.max_features, config.edge_types, config.positional_size, config.period) == (9, 15, 8, 1000)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden": 3}, r"unknown keys \['hidden'\]"),
        ({"format_version": 2}, "`format_version` .* must be 1, got 2"),
        ({"format_version": 2, "new_key": 1}, "`format_version` .* must be 1, got 2"),
        ({"format_version": "1"}, "`format_version` .* must be 1, got '1'"),
        ({"format_version": True}, "`format_version`"),
        ({"hidden_size": "128"}, "`hidden_size` .* whole number from 1 to 4096, got '128'"),
        ({"hidden_size": 128.0}, "`hidden_size`"),
        ({"hidden_size": True}, "`hidden_size`"),
        ({"hidden_size": 0}, "`hidden_size`"),
        ({"hidden_size": 10**9}, "`hidden_size` .* got 1000000000"),
        ({"num_layers": 1}, "`num_layers`"),
        ({"num_layers": 17}, "`num_layers`"),
        ({"max_horizon": 1001}, "`max_horizon`"),
        ({"max_features": -1}, "`max_features`"),
        ({"edge_types": 13}, "`edge_types`"),
        ({"positional_size": None}, "`positional_size`"),
        ({"context": 1}, "`context`"),
        ({"token_position_vocabulary": 10**10}, "`token_position_vocabulary`"),
        ({"period": 0}, "`period`"),
        ({"nowcaster_type": "lstm"}, r"`nowcaster_type` .* \('nino', 'wnn'\), got 'lstm'"),
        ({"nowcaster_type": ["nino"]}, "`nowcaster_type`"),
        ({"activation": "os.system"}, "`activation`"),
        ({"scale": "min-max"}, "`scale`"),
        ({"meta_trained_on": 5}, "`meta_trained_on`"),
    ],
)
def test_malformed_values_are_refused(changes, message):
    """One ValueError that names the key and what was found; sizes are capped."""
    with pytest.raises(ValueError, match=message):
        NowcasterConfig.from_dict({**NowcasterConfig().to_dict(), **changes})


@pytest.mark.parametrize("values", [[], "nino", None, {}, {"nowcaster_type": "nino"}, {"format_version": 1}])
def test_what_is_no_configuration_is_refused(values):
    """Not a mapping, or a mapping of something else."""
    with pytest.raises(ValueError, match="a nowcaster's configuration must"):
        NowcasterConfig.from_dict(values)
