"""The STVQA data engine: scene graphs in, multiple-choice questions in the STVQA-7K schema out (spec 3.3).

    python -m data.generate_stvqa all --graphs scenes:hard --limit 300 --out runs/data-demo
    python -m data.generate_stvqa write --graphs vg/scene_graphs.json --images vg --writer anthropic --model MODEL --dry-run
    python -m data.generate_stvqa check --out runs/stvqa        and so on: select, verify, pack, stats, view

    write   one call a picture -> written.jsonl, the replies as they came      (the only stages that cost
    verify  a second model sees the picture -> verified.jsonl                    anything: write and verify)
    check   replies -> checked.jsonl and rejected.jsonl: schema, graph, counts, options shuffled, sub-graph
    select  checked.jsonl -> selected.jsonl: quotas, rating, train and val by picture; --verified: what a verifier kept
    pack    selected.jsonl -> train-00000-of-00001.parquet and val-...        stats, view  -> stats.json, view.html

Every stage is the same command again after a kill. write and verify append a line a reply and never ask for one that is
there; SIGTERM and Ctrl-C let what is under way arrive first. The others are functions of the files before them: they
begin anew, and their files are renamed into place when whole. The same files and seed give the same data, on every machine.
"""

import hashlib
import io
import json
import sys
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import tyro
from PIL import Image

from command import StopSignal, one_line_errors, until_stopped
from data.pictures import open_picture, to_rgb
from data.rows import write_stvqa
from data.scene_graphs import Graph, read_graphs
from data.stvqa_calls import LOCAL, Caller, collect, estimate, picture_tokens, ticker
from data.stvqa_folder import appending, file_of, needed, record_at, records_of, replacing, settings_of
from data.stvqa_items import Balance, checked, read_items, read_letter, vote
from data.stvqa_page import statistics, table, view_page
from data.stvqa_prompts import VERIFIER, verifier_prompt, writer_prompt, writer_system
from data.stvqa_selection import choose
from data.stvqa_templates import write_items
from files import append_lines, replace_file
from providers import PROVIDERS, Reply, Request


@dataclass(frozen=True)
class Config:
    command: Annotated[str, tyro.conf.Positional]  # write, check, select, verify, pack, stats, view, or all
    out: str = "runs/stvqa"  # folder of everything that is made
    graphs: str | None = None  # scene_graphs.json, a VG150 or COCO file, or scenes:LEVEL; later stages know it from write
    images: str | None = None  # folder of the pictures; left out: that of the graphs
    limit: int | None = None  # first graphs only (scenes: how many to draw, 1000 if left out); raise it to go on with more
    seed: int | None = None  # 1 if left out, or what write was given
    dry_run: bool = False  # write, verify: print the number of calls and their price, ask nothing

    # write
    writer: str = "template"  # template (no model), openai, anthropic, hf or vllm (a checkpoint in this process)
    model: str | None = None  # of the writer
    base_url: str | None = None  # of the writer, for openai: any server of that form
    questions: int = 1  # a picture, asked for in one call
    temperature: float | None = 0.0  # of the writer; None is not sent, for served models that take none
    max_tokens: int = 1024  # of a reply, and of a verifier's

    # select
    target: int | None = None  # rows in all; left out: as many as there are
    relation_percent: float = 50.0  # of the rows; the other eight categories share the rest
    val_split: float = 0.1  # of the pictures
    verified: bool = False  # only questions that the verifier agreed with

    # verify
    verifier: str | None = None  # openai, anthropic, hf, vllm; `all` leaves this stage out without one
    verifier_model: str | None = None
    verifier_url: str | None = None
    tries: int = 4  # kept if one of so many agrees; each further one at retry_temperature
    retry_temperature: float | None = 1.0  # None is not sent, nor is the first try's 0

    # asking
    parallel: int = 8  # calls under way at once
    attempts: int = 6  # of one call, when it fails on the way
    timeout: float = 180.0  # seconds for one attempt
    price: tuple[float, float] | None = None  # dollars for a million tokens in and out, if providers.py does not know
    batch: int = 16  # prompts side by side, for hf and vllm
    device: str = "auto"  # for hf and vllm
    samples: int = 40  # on the page of view


def main(cfg: Config) -> None:
    cfg = with_source(check_config(cfg))
    if cfg.command != "all":
        COMMANDS[cfg.command](cfg)
        return
    plain = replace(cfg, verified=False)
    steps = [write, check, select, *((verify, select) if cfg.verifier else ()), pack, stats, view]
    for number, step in enumerate(steps):
        step(replace(cfg, verified=True) if step is select and number > 2 else plain)


def check_config(cfg: Config) -> Config:
    """Settings that cannot work, in one line each."""
    for flag, value, known in (("command", cfg.command, (*COMMANDS, "all")),
                               ("--writer", cfg.writer, ("template", *PROVIDERS, *LOCAL)),
                               ("--verifier", cfg.verifier or "hf", (*PROVIDERS, *LOCAL))):  # fmt: skip
        if value not in known:
            raise ValueError(f"{flag} {value}: unknown, choose {', '.join(known[:-1])} or {known[-1]}")
    for flag in ("limit", "questions", "max_tokens", "target", "tries", "parallel", "batch", "attempts", "samples"):
        value = getattr(cfg, flag)
        if value is not None and value < 1:
            raise ValueError(f"--{flag.replace('_', '-')} {value}: give 1 or more")
    for flag, value, who in (("temperature", cfg.temperature, cfg.writer),
                             ("retry-temperature", cfg.retry_temperature, cfg.verifier)):  # fmt: skip
        if value is None and who in LOCAL or value is not None and value < 0:
            raise ValueError(f"--{flag} {value}: give 0 (greedy) or more")
    if not 0 <= cfg.relation_percent <= 100 or not 0 <= cfg.val_split < 1:
        raise ValueError("--relation-percent is 0 to 100, --val-split 0 up to, not including, 1")
    if cfg.command in ("write", "all") and cfg.writer != "template" and not cfg.model:
        raise ValueError(f"--writer {cfg.writer} needs --model")
    if cfg.command in ("verify", "all") and cfg.verifier and not cfg.verifier_model:
        raise ValueError(f"--verifier {cfg.verifier} needs --verifier-model")
    if cfg.command == "verify" and not cfg.verifier:
        raise ValueError("--verifier is missing: choose openai, anthropic, hf or vllm")
    return cfg


# ---------------------------------------------------------------- the folder


def with_source(cfg: Config) -> Config:
    """The config with graphs, pictures, limit and seed of the questions in `out`, where some are there."""
    saved, written = settings_of(cfg.out).get("write"), file_of(cfg.out, "written")
    if saved is None or not (written.is_file() and written.stat().st_size):
        if cfg.graphs is None:
            raise ValueError("--graphs is missing: give scene_graphs.json, a VG150 or COCO file, or scenes:hard")
        limit = cfg.limit or (1000 if cfg.graphs.startswith("scenes") else None)
        return replace(cfg, limit=limit, seed=1 if cfg.seed is None else cfg.seed)
    if cfg.graphs not in (None, saved["graphs"]):
        raise ValueError(f"{cfg.out} holds questions about {saved['graphs']}: give that as --graphs, or another --out")
    return replace(cfg, graphs=saved["graphs"], images=cfg.images or saved["images"], limit=cfg.limit or saved["limit"],
                   seed=saved["seed"] if cfg.seed is None else cfg.seed)  # fmt: skip


def caller(cfg: Config, provider: str, model: str, base_url: str | None) -> Caller:
    same = ("max_tokens", "parallel", "attempts", "timeout", "price", "batch", "device", "seed")
    return Caller(provider, model, base_url, **{key: getattr(cfg, key) for key in same})


def graphs_in(cfg: Config, wanted: Iterable[str]) -> Iterator[Graph]:
    """The graphs with these ids in the order of the source, which is read no further than needed."""
    left = set(wanted)
    seed = settings_of(cfg.out)["write"]["seed"]  # not cfg's, which may be another for select: it says what was drawn
    for graph in read_graphs(cfg.graphs, cfg.images, seed=seed) if left else ():
        if graph.id in left:
            left.remove(graph.id)
            yield graph
            if not left:
                return
    if left:
        print(f"{len(left)} graphs of {cfg.out} are not in {cfg.graphs} any more, or without a picture: {min(left)} ...")


# ---------------------------------------------------------------- write


def write(cfg: Config) -> None:
    """One reply for each graph that has none yet. A reply counts as given however malformed: it was paid for."""
    if cfg.dry_run:
        estimate_write(cfg)
        return
    source, digest = Path(cfg.graphs), None
    if source.is_file():
        with open(source, "rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()[:16]
    prompt = hashlib.sha256(writer_system().encode()).hexdigest()[:16] if cfg.writer != "template" else None
    keys = ("graphs", "images", "limit", "seed", "writer", "model", "questions", "temperature", "max_tokens",
            "relation_percent")  # fmt: skip
    settings = {key: getattr(cfg, key) for key in keys} | {"content of graphs": digest, "prompt": prompt}
    if cfg.writer != "template":
        del settings["relation_percent"]
    done, balance, skipped = set(), Balance(), Counter()
    with appending(cfg.out, "write", "written", settings) as path:
        for _, record in records_of(path):
            if "text" in record:
                done.add(record["id"])
                for item in read_items(record["text"]):
                    balance.add(item)
        graphs = read_graphs(cfg.graphs, cfg.images, limit=cfg.limit, seed=cfg.seed, skipped=skipped)
        missing = (graph for graph in graphs if graph.id not in done)
        if cfg.writer == "template":
            write_templates(cfg, path, missing, balance)
        else:
            write_by_model(cfg, path, missing, balance)
    print(f"{path}: {sum('text' in record for _, record in records_of(path))} replies"
          + "".join(f"; {n} graphs left out: {why}" for why, n in skipped.items()))  # fmt: skip


def write_templates(cfg: Config, path: Path, graphs: Iterator[Graph], balance: Balance) -> None:
    tick, lines = ticker(), []
    for number, graph in enumerate(graphs, start=1):
        items = write_items(graph, balance, n=cfg.questions, relation_percent=cfg.relation_percent, seed=cfg.seed)
        for item in items:
            balance.add(item)
        lines.append({"id": graph.id, "text": json.dumps({"questions": items})})
        if len(lines) == 256:
            append_lines(path, lines)
            lines = []
        tick(lambda: f"written: {number} graphs")  # noqa: B023
    append_lines(path, lines)


def write_by_model(cfg: Config, path: Path, graphs: Iterator[Graph], balance: Balance) -> None:
    def line(reply: Reply) -> dict:
        for item in read_items(reply.text or ""):
            balance.add(item)
        return {"id": reply.id} | ({} if reply.error else {"text": reply.text, "finish": reply.finish})

    stop, system = StopSignal(), writer_system()
    requests = (
        Request(graph.id, writer_prompt(graph, balance, n=cfg.questions), system=system, max_tokens=cfg.max_tokens,
                temperature=cfg.temperature)
        for graph in until_stopped(graphs, stop)
    )  # fmt: skip
    try:
        collect(caller(cfg, cfg.writer, cfg.model, cfg.base_url), path, requests, line)
    finally:
        stop.restore()
    if stop.requested:
        raise SystemExit("stopped: every reply that came is kept, the same command goes on")


def estimate_write(cfg: Config) -> None:
    path, system = file_of(cfg.out, "written"), len(writer_system())
    done = {record["id"] for _, record in records_of(path) if "text" in record} if path.is_file() else set()
    graphs = read_graphs(cfg.graphs, cfg.images, limit=cfg.limit, seed=cfg.seed)
    texts = (writer_prompt(graph, Balance(), n=cfg.questions) for graph in graphs if graph.id not in done)
    if cfg.writer == "template":
        print(f"write: {sum(1 for _ in texts)} graphs, no calls: --writer template costs nothing")
    else:
        who = caller(cfg, cfg.writer, cfg.model, cfg.base_url)
        estimate(who, "write", ((system + len(text), 0) for text in texts), tokens_out=110 * cfg.questions)


# ---------------------------------------------------------------- check, select


def check(cfg: Config) -> None:
    """Each question on its own: one that is malformed, or says what its graph does not, costs itself."""
    path = needed(cfg.out, "written", "write")
    replies = {record["id"]: at for at, record in records_of(path) if "text" in record}
    kept, why = Counter(), Counter()
    with open(path, "rb") as file, replacing(file_of(cfg.out, "checked")) as keep, \
            replacing(file_of(cfg.out, "rejected")) as reject:  # fmt: skip
        for graph in graphs_in(cfg, replies):
            record, seen = record_at(file, replies[graph.id]), set()
            problem, items = picture_problem(graph), read_items(record["text"])
            if not items and '"questions": []' not in record["text"]:
                items, problem = [{"reply": record["text"][:500]}], problem or "no question in the reply"
            for item in items:
                try:
                    if problem:
                        raise ValueError(problem)
                    good = checked(item, graph)
                    if good["id"] in seen:
                        raise ValueError("the same question twice")
                except ValueError as error:
                    why[str(error)] += 1
                    reject({"id": graph.id, "why": str(error), "item": json.dumps(item)})  # as text: it may hold NaN
                    continue
                seen.add(good["id"])
                kept[good["category"]] += 1
                keep(good)
    print(f"{file_of(cfg.out, 'checked')}: {kept.total()} questions kept, {why.total()} rejected; "
          + ", ".join(f"{name} {n}" for name, n in kept.most_common()))  # fmt: skip
    for reason, n in why.most_common(10):
        print(f"  rejected {n}: {reason}")


def picture_problem(graph: Graph) -> str | None:
    """Why a picture cannot be used; None if it decodes (at an eighth of its size: cheap, and a cut file shows) and has
    the size that the graph's boxes are in."""
    if isinstance(graph.picture, Image.Image):
        return None
    try:
        with open_picture(graph.picture) as image:
            size = image.size
            image.draft("L", (size[0] // 8, size[1] // 8))
            image.load()
    except Exception as error:  # Pillow raises nearly anything on foreign bytes (data/pictures.py)
        return f"the picture cannot be read ({type(error).__name__})"
    return None if size == graph.size else "the picture has another size than the graph says"


def select(cfg: Config) -> None:
    path = needed(cfg.out, "checked", "check")
    keys = ("id", "graph", "category", "rating")
    items = [{key: record[key] for key in keys} for _, record in records_of(path)]
    if cfg.verified:
        kept = {item for item, letters in votes_of(cfg).items() if vote("agrees", letters, tries=cfg.tries)[0]}
        items = [item for item in items if item["id"] in kept]
    chosen = choose(items, target=cfg.target, relation_percent=cfg.relation_percent, val_split=cfg.val_split,
                    seed=cfg.seed)  # fmt: skip
    counts = {"train": Counter(), "val": Counter()}
    with replacing(file_of(cfg.out, "selected")) as keep:
        for _, record in records_of(path):
            if split := chosen.get(record["id"]):
                counts[split][record["category"]] += 1
                keep(record | {"split": split})
    for split, count in counts.items():
        relation = 100 * count["relation"] / max(1, count.total())
        print(f"{split}: {count.total()} of {len(items)} questions, {relation:.0f} % relation; "
              + ", ".join(f"{name} {n}" for name, n in count.most_common()))  # fmt: skip


# ---------------------------------------------------------------- verify


def votes_of(cfg: Config) -> dict[str, list[str]]:
    """{item id: ["agrees", "differs", ...]} in the order of the tries."""
    votes = defaultdict(list)
    for _, record in records_of(needed(cfg.out, "verified", "verify")):
        if "error" not in record:
            votes[record["item"]].append("agrees" if record["agrees"] else "differs")
    return votes


def verify(cfg: Config) -> None:
    """Round by round: everything open is asked once, what no try agreed with again. A call that failed is no vote."""
    selected = needed(cfg.out, "selected", "select")
    at: dict[str, list[int]] = defaultdict(list)  # graph id -> offsets of its items
    golds = {}
    for offset, record in records_of(selected):
        at[record["graph"]].append(offset)
        golds[record["id"]] = (record["gold"], record["options"])
    keys = ("verifier", "verifier_model", "retry_temperature", "max_tokens")
    settings = {key: getattr(cfg, key) for key in keys}
    settings["prompt"] = hashlib.sha256(VERIFIER.encode()).hexdigest()[:16]
    if cfg.dry_run:
        estimate_verify(cfg, selected, at)
        return

    def line(reply: Reply) -> dict:
        item = reply.id.rpartition("#")[0]
        gold, options = golds[item]
        letter = None if reply.error else read_letter(reply.text, options)
        made = {"id": reply.id, "item": item}
        return made if reply.error else made | {"text": reply.text, "letter": letter, "agrees": letter == gold}

    who = caller(cfg, cfg.verifier, cfg.verifier_model, cfg.verifier_url)
    with appending(cfg.out, "verify", "verified", settings) as path, open(selected, "rb") as file:
        stop = StopSignal()
        try:
            for round_ in range(cfg.tries):
                requests = until_stopped(verify_requests(cfg, file, at, votes_of(cfg), round_), stop)
                collect(who, path, requests, line)
        finally:
            stop.restore()
        votes = votes_of(cfg)
    verdicts = Counter(vote("agrees", votes.get(item, []), tries=cfg.tries)[0] for item in golds)
    print(f"{path}: of {len(golds)} questions {verdicts[True]} kept, {verdicts[False]} refused, {verdicts[None]} open")
    if stop.requested:
        raise SystemExit("stopped: every reply that came is kept, the same command goes on")


def verify_requests(cfg: Config, file, at: dict, votes: dict, round_: int) -> Iterator[Request]:
    """The questions with exactly `round_` votes, none of which agrees."""
    for graph in graphs_in(cfg, at):
        for offset in at[graph.id]:
            item = record_at(file, offset)
            letters = votes.get(item["id"], [])
            if len(letters) == round_ and "agrees" not in letters:
                greedy = round_ == 0 and cfg.retry_temperature is not None
                yield Request(f"{item['id']}#{round_}", verifier_prompt(item), images=(jpeg_bytes(graph.picture),),
                              max_tokens=cfg.max_tokens,
                              temperature=0.0 if greedy else cfg.retry_temperature)  # fmt: skip


def estimate_verify(cfg: Config, selected: Path, at: dict) -> None:
    asked = votes_of(cfg) if file_of(cfg.out, "verified").is_file() else {}
    with open(selected, "rb") as file:
        calls = (
            (len(verifier_prompt(item)), picture_tokens(graph.size, cfg.verifier))
            for graph in graphs_in(cfg, at) for item in [record_at(file, offset) for offset in at[graph.id]]
            if vote("agrees", asked.get(item["id"], []), tries=cfg.tries)[0] is None
        )  # fmt: skip
        who = caller(cfg, cfg.verifier, cfg.verifier_model, cfg.verifier_url)
        estimate(who, "verify", calls, tokens_out=10, at_most=cfg.tries)


# ---------------------------------------------------------------- pack, stats, view


def pack(cfg: Config) -> None:
    """train and val parquet in the STVQA-7K columns; a row group at a time, whatever the number of rows."""
    path = needed(cfg.out, "selected", "select")
    if not path.stat().st_size:
        raise ValueError(f"{path}: no question was kept: rejected.jsonl and verified.jsonl beside it say why")
    for split in ("train", "val"):
        at: dict[str, list[int]] = defaultdict(list)
        for offset, record in records_of(path):
            if record["split"] == split:
                at[record["graph"]].append(offset)
        target = Path(cfg.out) / f"{split}-00000-of-00001.parquet"
        if at:
            with open(path, "rb") as file:
                n = write_stvqa(packed_rows(cfg, file, at), target)
            print(f"{target}: {n} rows, {target.stat().st_size / 2**20:.1f} MB")
        else:
            target.unlink(missing_ok=True)


def packed_rows(cfg: Config, file, at: dict[str, list[int]]) -> Iterator[dict]:
    for graph in graphs_in(cfg, at):
        picture = jpeg_bytes(graph.picture)
        for offset in at[graph.id]:
            item = record_at(file, offset)
            yield dict(id=item["id"], source=cfg.graphs, category=item["category"], images=[picture],
                       question=item["question"], options=item["options"], gold=item["gold"], kind="choice",
                       size=graph.size, scene=item["scene"], map=None, problem=None, style=None,
                       meta={"image_id": graph.id, "level": item["level"], "rating": item["rating"]})  # fmt: skip


def jpeg_bytes(picture: str | bytes | Image.Image) -> bytes:
    """A JPEG file as it is (upstream encodes again); anything else, and one with a turning mark, encoded: boxes are in
    pixels as stored, and the mark would turn the picture under them."""
    if isinstance(picture, str):
        picture = Path(picture).read_bytes()
    with open_picture(picture) as image:
        if isinstance(picture, bytes) and image.format == "JPEG" and image.getexif().get(0x0112, 1) == 1:
            return picture
        buffer = io.BytesIO()
        to_rgb(image).save(buffer, "JPEG", quality=95, subsampling=0)
    return buffer.getvalue()


def parquets(cfg: Config) -> list[Path]:
    found = [path for split in ("train", "val") for path in sorted(Path(cfg.out).glob(f"{split}-*.parquet"))]
    if not found:
        raise FileNotFoundError(f"{cfg.out}: no parquet file: run pack --out {cfg.out} first")
    return found


def stats(cfg: Config) -> None:
    result = {path.name.partition("-")[0]: statistics(path) for path in parquets(cfg)}
    replace_file(Path(cfg.out) / "stats.json", json.dumps(result, indent=1).encode())
    print("\n".join(table(result)))


def view(cfg: Config) -> None:
    path = Path(cfg.out) / "view.html"
    replace_file(path, view_page(parquets(cfg), samples=cfg.samples, title=cfg.out).encode())
    print(f"{path}: open it in a browser")


COMMANDS = {"write": write, "check": check, "select": select, "verify": verify, "pack": pack, "stats": stats, "view": view}

if __name__ == "__main__":
    try:
        with one_line_errors():
            main(tyro.cli(Config, description=__doc__.split("\n\n")[0]))
    except KeyboardInterrupt:
        print("\nstopped: what came is kept, the same command goes on", file=sys.stderr)
        raise SystemExit(130) from None
