"""scores.py and the rescoring of transcripts.py: numbers by hand, the published aggregates, files of the published scripts.

python -m pytest tests/test_scores.py
"""

import json
import math
import re
from pathlib import Path

import pytest

import scores
from data.benchmarks import BENCHMARKS, spar_level
from rewards import grade
from transcripts import published_records, read_transcripts, rescore

VECTORS = [json.loads(line) for line in (Path(__file__).parent / "vectors" / "spacer.jsonl").read_text().splitlines()]
VSI_NUMBERS = ("object_abs_distance", "object_counting", "object_size_estimation", "room_size_estimation")


def record(key, correct, *, category="c", answer="A", dataset="mine", **more):
    line = {"id": key, "dataset": dataset, "category": category, "kind": "choice", "options": ["x", "y"], "correct": correct}
    line |= {"answer": answer, "finished": True, "format": 0.0, "question": f"q {key}", "gold": "A", "meta": {}}
    return line | more


# ---------------------------------------------------------------- by hand


def test_samples_of_a_row_are_one_row():
    """Row a: right, wrong, wrong, wrong; row b: right in all four; row c: unread in all."""
    said = [(1, "A"), (0, "B"), (0, "B"), (0, "C")]
    records = [record("a", value, sample=n, answer=answer) for n, (value, answer) in enumerate(said)]
    records += [record("b", 1, sample=n) for n in range(4)] + [record("c", 0, sample=n, answer=None) for n in range(4)]
    result = scores.scores(records)
    assert (result["n"], result["accuracy"]) == (3, pytest.approx((0.25 + 1 + 0) / 3))
    deviation = sum((v - 1.25 / 3) ** 2 for v in (0.25, 1, 0)) / 3
    assert result["se"] == pytest.approx(math.sqrt(deviation / 3))
    assert result["samples"]["k"] == 4 and result["samples"]["mean"]["accuracy"] == result["accuracy"]
    assert result["samples"]["pass"]["accuracy"] == pytest.approx(2 / 3)
    assert result["samples"]["majority"]["accuracy"] == pytest.approx(1 / 3)
    assert result["unparsed"] == pytest.approx(4 / 12)
    lines = "\n".join(scores.table(result))
    assert "pass@4" in lines and "majority of 4" in lines
    assert scores.scores([record("a", 1)])["samples"] is None


def test_rows_without_all_samples_are_in_the_mean_alone():
    records = [record("a", n == 3, sample=n) for n in range(4)] + [record("b", 0, sample=0)]
    found = scores.samples(records)
    assert found["pass"] == {"n": 1, "accuracy": 1.0, "se": 0.0} and found["majority"]["n"] == 1
    assert found["mean"]["n"] == 2 and found["mean"]["accuracy"] == 0.125


def test_a_tie_of_the_majority_is_shared():
    assert scores.majority([record("a", 1, answer="A"), record("a", 0, answer="B")]) == 0.5
    assert scores.majority([record("a", 1, answer="A"), record("a", 0, answer="B"), record("a", 0, answer="B")]) == 0.0
    assert scores.majority([record("a", 0, answer=None)]) == 0.0


def test_the_majority_of_texts_is_counted_as_they_are_compared():
    part = [record("a", 1, kind="text", answer=text) for text in ("left", "Left", "left.", "the left")]
    part += [record("a", 0, kind="text", answer="right")] * 2
    assert scores.majority(part) == 1.0


def test_macro_weighs_groups_alike_and_carries_their_errors():
    """CV-Bench's own number: (mean of ADE20K and COCO, and Omni3D) / 2."""
    plan = {"ADE20K": [1, 0, 0, 0], "COCO": [1, 1], "Omni3D": [1, 1, 1, 0, 0, 0]}
    kinds = {"ADE20K": "2D", "COCO": "2D", "Omni3D": "3D"}
    records = [
        record(f"{source}{n}", value, dataset="cv-bench", meta={"source": source, "type": kinds[source]})
        for source, values in plan.items() for n, value in enumerate(values)
    ]  # fmt: skip
    result = scores.scores(records)
    assert result["accuracy"] == pytest.approx(6 / 12)
    assert result["macro"]["accuracy"] == pytest.approx(((0.25 + 1) / 2 + 0.5) / 2)
    ade, omni = 0.25 * 0.75 / 4, 0.25 / 6
    assert result["macro"]["se"] == pytest.approx(math.sqrt(ade / 16 + omni / 4))
    assert result["by"]["type"]["2D"]["n"] == 6 and "mean of type, of source" in "\n".join(scores.table(result))


def test_pairs_and_circles_must_be_right_together():
    records = [record(str(n), value, dataset="mmvp", meta={"pair": n // 2}) for n, value in enumerate((1, 1, 1, 0, 0, 0))]
    result = scores.scores(records)
    assert result["accuracy"] == 0.5 and result["together"]["pair"]["n"] == 3
    assert result["together"]["pair"]["accuracy"] == pytest.approx(1 / 3)
    assert "all right in each pair" in "\n".join(scores.table(result))


def test_rows_are_right_together_in_a_sample_not_on_average():
    """Each row of the pair is right in one of two samples, but never in the same one; the other pair in both."""
    plan = {"0": (1, 0), "1": (0, 1), "2": (1, 1), "3": (1, 1)}
    records = [record(key, value, dataset="mmvp", sample=n, meta={"pair": int(key) // 2})
               for key, values in plan.items() for n, value in enumerate(values)]  # fmt: skip
    for order in (records, records[::-1]):  # served answers come in any order
        assert scores.scores(order)["together"]["pair"] | {"se": 0} == {"n": 2, "accuracy": 0.5, "se": 0, "incomplete": 0}


def test_a_group_that_is_not_whole_is_left_out_and_counted():
    """Pair 0 is whole, of pair 1 a row was skipped, of pair 2 one is not there (failed, or beyond --limit)."""
    meta = [{"pair": n // 2, "rows_of": {"pair": 2}} for n in range(5)]
    records = [record(str(n), 1, dataset="mmvp", meta=meta[n]) for n in (0, 1, 2, 4)]
    records.append({"id": "3", "dataset": "mmvp", "category": "c", "meta": meta[3], "skipped": "torn"})
    result = scores.scores(records)
    assert result["together"]["pair"] == {"n": 1, "accuracy": 1.0, "se": 0.0, "incomplete": 2}
    assert "2 incomplete, left out" in "\n".join(scores.table(result))
    sampled = [record(str(row), 1, dataset="mmvp", sample=n, meta=meta[row]) for row in (0, 1) for n in range(2)]
    assert scores.scores(sampled[:-1])["together"]["pair"]["incomplete"] == 1, "a sample of it failed"


def test_shares_of_an_empty_and_a_skipped_file():
    for records in ([], [{"id": "a", "dataset": "mmvp", "skipped": "torn"}]):
        result = scores.scores(records)
        assert result["n"] == 0 and result["accuracy"] is None and result["macro"] is None
        assert scores.table(result)


def test_tokens_and_dollars():
    records = [record("a", 1, model="m", tokens=10, tokens_in=100), record("b", 1, model="m", tokens=None, tokens_in=None)]
    result = scores.scores(records, price=(1.0, 10.0))
    assert result["usage"] == {"tokens_in": 100, "tokens_out": 10, "cost": pytest.approx(200e-6)}
    assert "100 tokens in, 10 out, price unknown" in "\n".join(scores.table(scores.scores(records)))


def test_the_paired_difference_by_hand():
    a = [record("1", 1), record("2", 0), record("3", 0, category="d"), record("4", 1, category="d"), record("5", 1)]
    b = [record("1", 1), record("2", 1), record("3", 1, category="d"), record("4", 0, category="d"), record("6", 1)]
    result = scores.compare(a, b)
    assert (result["n"], result["a"], result["b"], result["difference"]) == (4, 0.5, 0.75, 0.25)
    assert result["se"] == pytest.approx(math.sqrt((0.0625 + 2 * 0.5625 + 1.5625) / 4 / 4))
    assert (result["only_b_right"], result["only_a_right"], result["only_in_a"], result["only_in_b"]) == (2, 1, 1, 1)
    assert result["by_category"]["d"]["accuracy"] == 0.0
    text = "\n".join(scores.comparison(result))
    assert "+0.250" in text and "left out: 1 rows only in a, 1 only in b" in text
    with pytest.raises(ValueError, match="id '1' is another question in the second file"):
        scores.compare(a, [record("1", 1, question="other")])
    with pytest.raises(ValueError, match="no row was answered in both"):
        scores.compare(a, [record("9", 1)])


# ---------------------------------------------------------------- the published aggregates


def graded(docs, rule, category, kind_of=lambda doc: "choice"):
    found = []
    for n, doc in enumerate(docs):
        meta = {"rule": rule}
        meta |= {"level": spar_level(doc["task"]), "view": doc["image_type"]} if rule == "spar-bench" else {}
        meta |= {"duration": doc["duration"]} if rule == "video-mme" else {}
        row = record(str(n), 0, category=doc[category], kind=kind_of(doc), gold=doc["ground_truth"], options=[], meta=meta,
                     dataset=rule)  # fmt: skip
        found.append(row | grade(row, doc["predicted_answer"], mode="upstream"))
    return found


def vsi_kind(doc):
    return "mra" if doc["question_type"] in VSI_NUMBERS else "choice"


def spar_kind(doc):
    kind = "mra" if doc["task"].startswith(("depth", "distance_p")) else "choice"
    return "view_change" if doc["task"] == "view_change_infer" else kind


def vectors(function):
    found = [v for v in VECTORS if v["function"] == function]
    assert found
    return [(v["input"]["docs"], v["expected"]["value"]) for v in found]


def test_vsi_bench_as_published():
    for docs, want in vectors("vsibench_eval"):
        records = graded(docs, "vsi-bench", "question_type", vsi_kind)
        result = scores.scores(records, mode="upstream")
        assert result["published"]["overall"] == pytest.approx(want["overall_accuracy"], abs=1e-9)
        for name, part in result["by_category"].items():
            for key in (f"{name}_accuracy", f"{name}_MRA:.5:.95:.05"):
                assert key not in want or part["accuracy"] == pytest.approx(want[key], abs=1e-9)
        for r in records:
            r["meta"]["task"] = re.sub("_(easy|medium|hard)$", "", r["category"])
        if sum("direction" in name for name in result["by_category"]) == 3:  # then the table's own mean is the same
            assert scores.scores(records)["macro"]["accuracy"] == pytest.approx(want["overall_accuracy"], abs=1e-9)


def test_vsi_bench_with_a_missing_level():
    """Spec 5.2: levels popped so far are lost, the direction is 0."""
    records = [record(str(n), value, dataset="vsi-bench", category=f"object_rel_direction_{level}")
               for n, (level, value) in enumerate((("easy", 1), ("hard", 1)))]  # fmt: skip
    assert scores.published(records, "vsi-bench")["overall"] == pytest.approx((1 + 0) / 2)


def test_sti_bench_as_published_first_and_later():
    for docs, want in vectors("stibench_eval"):
        result = scores.scores(graded(docs, "sti-bench", "task"), mode="upstream")
        assert result["published"]["overall"] == pytest.approx(want["overall_accuracy"], abs=1e-9)
        assert result["published"]["spatial"] == pytest.approx(want["sr_sub_accuracy"], abs=1e-9)
        for name, part in result["by_category"].items():
            assert part["accuracy"] == pytest.approx(want[name], abs=1e-9)
    for docs, want in vectors("stibench_eval_later_revision"):
        rows = scores.accuracy(graded(docs, "sti-bench", "task"))["accuracy"]
        assert rows == pytest.approx(want["overall_accuracy"], abs=1e-9)


def test_spar_bench_as_published():
    for docs, want in vectors("sparbench_eval"):
        result = scores.scores(graded(docs, "spar-bench", "task", spar_kind), mode="upstream")
        overall = want["overall"]
        assert result["published"]["overall"] == pytest.approx(overall["overall_accuracy"], abs=1e-9)
        for name in ("Low", "Middle", "High"):
            assert result["published"][name.lower()] == pytest.approx(overall[name], abs=1e-9)
        assert result["macro"]["accuracy"] == pytest.approx(overall["overall_accuracy"], abs=1e-9)


def test_video_mme_as_published():
    for docs, want in vectors("videomme_eval"):
        records = graded(docs, "video-mme", "task")
        result = scores.scores(records)
        assert result["accuracy"] == pytest.approx(want["all_duration_tasks"]["overall_accuracy"], abs=1e-9)
        for name, part in result["by"]["duration"].items():
            assert part["accuracy"] == pytest.approx(want[f"duration_{name}"]["overall_accuracy"], abs=1e-9)
        for name, part in result["by_category"].items():
            assert part["accuracy"] == pytest.approx(want["all_duration_tasks"][f"{name}_accuracy"], abs=1e-9)


# ---------------------------------------------------------------- files of the published scripts


def evals_file(folder: Path) -> Path:
    """As evals.py writes it: bare letters are scored as A, a word for gold keeps one letter, running counters stand by."""
    prompt = "Reason first. An example: (A) x (B) y\nQuestion: Which is closer? Select from the following choices.\n"
    prompt += "(A) table\n(B) chair"
    texts = [("B", "The answer is B.", "A", 0), ("B", "<answer> (B) chair </answer>", "B", 1), ("A", "who knows", "A", 1),
             ("B", "", "Failed to extract.", 0), ("A", "<answer>chair</answer>", "B", 0)]  # fmt: skip
    items = [{"prompt": prompt, "correct_answer": gold, "reasoning": text, "pred_answer": pred, "correct": correct,
              "task": "Depth", "Depth_correct": 1} for gold, text, pred, correct in texts]  # fmt: skip
    items[-1]["final_accuracy"] = 0.4
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "cv-bench-3D_SpatialThinker-7B.json").write_text(json.dumps(items, indent=2))
    return folder / "cv-bench-3D_SpatialThinker-7B.json"


def test_published_json_is_graded_again_and_its_own_verdicts_come_back_upstream(tmp_path, capsys):
    file = evals_file(tmp_path / "outputs")
    [ours] = rescore(str(file), out=str(tmp_path / "ours"))
    assert ours["accuracy"] == pytest.approx(2 / 5) and ours["unparsed"] == pytest.approx(2 / 5)
    printed = capsys.readouterr().out
    assert "2 of 5 verdicts changed: 0, 2, accuracy was 0.400" in printed
    folder = tmp_path / "ours" / file.stem
    records = read_transcripts(folder / "transcripts.jsonl")
    assert [r["options"] for r in records] == [["table", "chair"]] * 5 and records[0]["category"] == "Depth"
    [theirs] = rescore(str(file), out=str(tmp_path / "theirs"), mode="upstream")
    assert theirs["accuracy"] == pytest.approx(2 / 5) and "0 of 5 verdicts changed" in capsys.readouterr().out
    [again] = rescore(str(folder / "transcripts.jsonl"))  # and ours once more, in place
    assert again == ours


def test_published_words_hallusionbench_and_mmvp(tmp_path):
    def one(name, gold, prompt, text="<answer>yes</answer>"):
        file = tmp_path / f"{name}_model.json"
        entry = {"prompt": prompt, "correct_answer": gold, "reasoning": text, "correct": 0, "task": None}
        file.write_text(json.dumps([entry]))
        [found] = published_records(file)
        return found["dataset"], found["kind"], found["gold"], found["options"]

    assert one("robospatial_rgb", "y", "Is it?\n(A) yes\n(B) no") == ("robospatial_rgb", "choice", "A", ["yes", "no"])
    red = "Is it red?\nOptions:\n(A) Yes \n(B) No"
    assert one("hallusionbench", "A", red) == ("hallusionbench", "choice", "A", ["Yes", "No"])
    assert one("hallusionbench", "0", red)[2] == "B"
    open_closed = "Open or closed? (a) Open (b) Closed. Please give the final answer within answer tags."
    assert one("mmvp", "(b)", open_closed)[1:] == ("choice", "B", ["Open", "Closed."])
    assert one("spatialbench", "3", "How many?") == ("spatialbench", "number", "3", [])
    assert one("realworld_qa", "yes", "Is it?") == ("realworld_qa", "yes_no", "yes", [])


def test_spacers_jsonl_is_graded_again(tmp_path):
    rows = [
        {"id": 1, "question": "Where?", "promt": "Where?\nOptions:\nA. left\nB. right\nletter", "ground_truth": "B",
         "question_type": "object_rel_direction_easy", "predicted_answer": "<think>a</think><answer>(B)</answer>"},
        {"id": 2, "question": "How many?", "promt": "How many?", "ground_truth": "4", "question_type": "object_counting",
         "predicted_answer": "I see a table and 4 chairs: 4"},
    ]  # fmt: skip
    (tmp_path / "VSI-Bench_results.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    [ours] = rescore(str(tmp_path), out=str(tmp_path / "ours"))
    [theirs] = rescore(str(tmp_path / "VSI-Bench_results.jsonl"), out=str(tmp_path / "theirs"), mode="upstream")
    assert ours["accuracy"] == 1.0 and theirs["accuracy"] == 0.0 and theirs["published"]["overall"] == 0.0


def test_a_folder_of_results_and_what_is_none(tmp_path):
    evals_file(tmp_path / "a")
    (tmp_path / "a" / "notes.json").write_text("{}")
    assert len(rescore(str(tmp_path), out=str(tmp_path / "out"))) == 1
    twice = evals_file(tmp_path / "both" / "one"), evals_file(tmp_path / "both" / "two")  # of one name
    assert len(rescore(str(tmp_path / "both"), out=str(tmp_path / "graded"))) == 2
    for file in twice:
        assert (tmp_path / "graded" / file.parent.name / file.stem / "transcripts.jsonl").is_file()
    with pytest.raises(FileNotFoundError, match="no transcripts.jsonl and no published result"):
        (tmp_path / "empty").mkdir()
        rescore(str(tmp_path / "empty"))
    with pytest.raises(FileNotFoundError, match="--rescore .*absent: no such file"):
        rescore(str(tmp_path / "absent"))
    with pytest.raises(ValueError, match="--mode upstream with --rescore needs --out"):
        rescore(str(tmp_path / "a"), mode="upstream")
    wrong = tmp_path / "a" / "mathvista_model.json"
    wrong.write_text('[{"correct_answer": "A", "reasoning": "A"}]')
    with pytest.raises(ValueError, match="mathvista_model.json: not a list of answers to one of"):
        rescore(str(wrong), out=str(tmp_path / "b"))
    (cut := tmp_path / "mmvp_cut.json").write_text('[{"prompt": "Whe')
    with pytest.raises(ValueError, match="mmvp_cut.json: not JSON, or cut off"):
        rescore(str(cut), out=str(tmp_path / "b"))
    (tmp_path / "a" / "mmvp_model.json").write_text('[{"correct_answer": "A", "reasoning": "A"}]')
    with pytest.raises(ValueError, match="mmvp_model.json, entry 1: KeyError: 'prompt'"):
        rescore(str(tmp_path / "a" / "mmvp_model.json"), out=str(tmp_path / "b"))


def test_every_cut_of_the_table_can_be_printed():
    for name, bench in BENCHMARKS.items():
        meta = {key: "g" for key in (*bench.macro, *bench.by, *bench.together)}
        result = scores.scores([record("a", 1, dataset=name, meta=meta), record("b", 0, dataset=name, meta=meta)])
        assert len(scores.table(result)) >= 3 + bool(bench.macro) + len(bench.by) + len(bench.together), name
