"""What a cache kept, as arrays, on a terminal and as a page."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from benchmodel import directory, loaded
from liquidfusion.bench.caches import CacheOptions
from liquidfusion.bench.cli import main
from liquidfusion.bench.jobs import showing
from liquidfusion.bench.parameters import strategy_names
from liquidfusion.exceptions import ConfigError

TEXT = "once upon a time there was a little cache that forgot <almost> everything. " * 2


@pytest.mark.parametrize("strategy", strategy_names())
def test_kept_tokens_fill_the_budget(strategy: str) -> None:
    kept = showing.keep(loaded(), TEXT, CacheOptions(strategy=strategy, budget=24), max_tokens=3)
    assert "".join(kept.tokens[: len(TEXT)]) == TEXT
    assert kept.kept.shape == (2, 2, len(TEXT) + 3)
    per_head = kept.kept.sum(-1)
    if strategy == "full":
        assert kept.share().min() == 1
    else:
        assert (per_head <= 24).all()
        assert (per_head > 16).all()
    # the newest tokens are always there, of every head
    if strategy not in ("tova", "random"):
        assert kept.share()[-3:].min() == 1
    if strategy in ("streaming", "liquid_fusion"):
        assert kept.share()[:4].min() == 1


def test_levels_rank_the_mass() -> None:
    kept = showing.keep(loaded(), TEXT, CacheOptions(strategy="h2o", budget=40))
    assert kept.mass is not None
    letters = np.array(list(kept.levels()[1][0]))
    assert ((letters == "-") == ~kept.kept[1, 0]).all()
    levels = letters[letters != "-"].astype(int)
    assert set(levels) == set(range(10))
    order = kept.mass[1, 0][kept.kept[1, 0]].argsort()
    assert (np.diff(levels[order]) >= 0).all()
    assert kept.intensity(1, 0)[kept.kept[1, 0]].max() == 1


def test_place_is_checked() -> None:
    config = loaded().model.config
    showing.check_place(config, 1, 1)
    with pytest.raises(ConfigError, match="layer 2: 0 to 1"):
        showing.check_place(config, 2, None)


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    show = ["show", "-m", str(directory()), "--device", "cpu", "--prompt", TEXT, "-c", "20"]
    page = tmp_path / "show.html"
    assert main([*show, "--html", str(page), "--layer", "0"]) == 0
    assert "are kept by none" in capsys.readouterr().out
    text = page.read_text(encoding="utf8")
    assert text.count("<span>") == len(TEXT)
    assert "&lt;" in text
    assert "http" not in text
    assert main([*show, "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert len(shown["tokens"]) == len(shown["share"]) == len(shown["attention_rank"]) == len(TEXT)
    assert main([*show, "--head", "9"]) == 2
    assert "0 to 1" in capsys.readouterr().err
