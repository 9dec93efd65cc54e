"""The hub's folder: a round trip is bit-equal offline, the card says what was measured, others are refused."""

from __future__ import annotations

import json

import pytest
import torch

import qsnn

pytest.importorskip("huggingface_hub", reason="huggingface_hub is not installed (extra hub)")

from qsnn.export.hub import CARD, CONFIG, WEIGHTS, from_pretrained, model_card, save_pretrained, write


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    import huggingface_hub.constants

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)


@pytest.mark.parametrize("kind", ["qann", "snn", "folded"])
def test_a_round_trip_is_bit_equal(kind, qann, snn, images, tmp_path):
    model = {"qann": qann, "snn": snn, "folded": None}[kind] or qsnn.fold(snn)
    assert write(model, tmp_path / "net") == tmp_path / "net"
    assert {path.name for path in (tmp_path / "net").iterdir()} == {WEIGHTS, CONFIG, CARD}
    again = from_pretrained(tmp_path / "net")
    assert type(again).__name__ == type(model).__name__
    with torch.no_grad():
        assert torch.equal(again(images), model(images))
    config = json.loads((tmp_path / "net" / CONFIG).read_text())
    assert config["library_name"] == "qsnn" and config["recipe"]["kind"] == kind


def test_the_card_says_what_was_measured(qann, snn, digits, tmp_path):
    folded, some = qsnn.fold(snn), digits.test.head(60)
    found = qsnn.benchmark(folded, some, timesteps=2)
    certificate = qsnn.certify(folded, qann, some)
    save_pretrained(folded, tmp_path, benchmark=found, certificate=certificate, repo_id="someone/digits")
    card = (tmp_path / CARD).read_text()
    assert card.startswith("---\nlibrary_name: qsnn\n")
    assert f"| 2 | {found.accuracy[1]:.2f} |" in card and "60 test images" in card
    assert "**EXACT**" in card and "weight_bits=4" in card and 'from_pretrained("someone/digits")' in card
    assert all(f"| {e.name} | " in card and e.source in card for e in found.energy)
    from huggingface_hub import ModelCard

    assert ModelCard(card).data.library_name == "qsnn"
    save_pretrained(folded, tmp_path)
    bare = (tmp_path / CARD).read_text()
    assert "Not measured" in bare and "Not certified" in bare
    assert bare == model_card(folded)


def test_what_is_not_ours_is_refused_in_one_line(snn, tmp_path):
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    with pytest.raises(ValueError, match=r"is no model of qsnn: it has no config.json"):
        from_pretrained(foreign)
    (foreign / CONFIG).write_text('{"library_name": "transformers"}')
    with pytest.raises(ValueError, match="names the library 'transformers'"):
        from_pretrained(foreign)
    (foreign / CONFIG).write_text("{")
    with pytest.raises(ValueError, match="cannot be read") as error:
        from_pretrained(foreign)
    assert "\n" not in str(error.value)
    with pytest.raises(OSError, match="cannot fetch nobody/nothing: ") as missing:
        from_pretrained("nobody/nothing", cache_dir=tmp_path / "cache")
    assert "\n" not in str(missing.value)
    save_pretrained(snn, tmp_path / "net")
    config = json.loads((tmp_path / "net" / CONFIG).read_text())
    (tmp_path / "net" / CONFIG).write_text(json.dumps({**config, "sha256": "0" * 64}))
    with pytest.raises(ValueError, match=r"model.safetensors is not the file that config.json names"):
        from_pretrained(tmp_path / "net")
    with pytest.raises(ValueError, match="repo_id='user/name' to push to"):
        save_pretrained(snn, tmp_path / "net", push=True)
    with pytest.raises(ValueError, match=r"is a file; name a folder"):
        save_pretrained(snn, tmp_path / "net" / CONFIG)
