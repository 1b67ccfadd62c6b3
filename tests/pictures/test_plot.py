# SPDX-License-Identifier: Apache-2.0
"""``verl-dvpo plot``: its page is whole in itself, in a parser and in a browser; bad input gets one line."""

import base64
import io
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import typer
from export import tiny
from pictures import made
from PIL import Image
from typer.testing import CliRunner

from verl_dvpo import ValueModel
from verl_dvpo.pictures.commands import plot
from verl_dvpo.pictures.page import coloured_text
from verl_dvpo.pictures.runs import group_runs
from verl_dvpo.saved.values import LEVELS, Dump

VOID = {"meta", "img", "br"}
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")


class Parsed(HTMLParser):
    """Collects what a page refers to, its text and its tables, and sees that its tags are closed."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.references: list[str] = []
        self.scripts = 0
        self.rows: list[list[str]] = []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.scripts += tag == "script" or any(name.startswith("on") for name, _ in attributes)
        self.references += [value for name, value in attributes if name in ("src", "href", "srcset", "data")]
        if tag not in VOID:
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] in ("td", "th"):
            self.rows[-1].append(data)


def command(*arguments: object) -> int:
    """Runs the command as the command line does."""
    app = typer.Typer()
    app.command()(plot)
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    if isinstance(result.exception, ValueError):
        raise result.exception
    return result.exit_code


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    """The folder that the command makes of a run with a right and a wrong answer."""
    folder = tmp_path_factory.mktemp("plot")
    run = made.save_run(folder / "run", made.story(), Dump(20, (made.answer(1.0, 3, pieces=("<b>", "&", "'")),)))
    assert command(run, "--out", folder / "pictures") == 0
    return folder / "pictures"


def test_the_page_refers_to_nothing_outside_itself(drawn):
    text = (drawn / "index.html").read_text()
    page = Parsed(text)
    assert page.scripts == 0
    assert len(page.references) == 6  # the pair, four answers, the calibration
    assert all(reference.startswith("data:image/png;base64,") for reference in page.references)
    assert not re.search(r"https?:|url\(|@import|//", re.sub(r"data:[^\"]*", "", text))
    names = ["fan", "answer_1", "answer_2", "answer_3", "answer_4", "calibration"]
    assert sorted(file.name for file in drawn.iterdir()) == sorted(["index.html", *(f"{name}.png" for name in names)])
    for name, reference in zip(names, page.references, strict=True):
        content = base64.b64decode(reference.partition(",")[2])
        assert content == (drawn / f"{name}.png").read_bytes()
        with Image.open(io.BytesIO(content)) as image:
            image.load()
            assert image.width > 500


def test_the_page_has_a_title_and_the_runs_settings_and_says_how_many_answers(drawn):
    text = (drawn / "index.html").read_text()
    assert "<title>What the critic believes: run</title>" in text
    rows = dict(Parsed(text).rows)
    assert rows["answers"] == "5"
    assert rows["tokens"] == "24"  # 8 + 9 + 1 + 3 of a tool's answer + 3
    assert rows["steps"] == "2: 10, 20"
    assert rows["critic.value.family"] == "quantile_ensemble"
    assert rows["data.seed"] == "7"
    assert rows["returns in the 50 % band"].startswith("0.125 [")  # three of 24: the states after the fall


def test_text_is_escaped_and_coloured_by_the_change_of_the_median():
    text = coloured_text(made.falling(4, 1, reward=-0.1))
    found = re.findall(r"rgba\((\d+), \d+, \d+, ([\d.]+)\)", text)
    # Median 0.5, 0.5, 0, 0, and then -0.1 comes: the second token's fall is the whole range, the last a fifth of it.
    assert found == [("0", "0.00"), ("213", "0.80"), ("0", "0.00"), ("213", "0.16")]
    odd = coloured_text(made.answer(1.0, 3, pieces=("<b>", "&", "'"), prompt="<i>"))
    assert "<b>" not in odd
    assert "<i>" not in odd
    assert "&lt;b&gt;" in odd
    assert coloured_text(made.answer(1.0, 5, mask=[1, 0, 0, 1, 1])).count('class="given"') == 3


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")
def test_a_real_browser_shows_every_image_and_asks_for_nothing(drawn, tmp_path):
    """The page itself, with a probe at its end that says what the browser made of it."""
    probe = (
        "<script>addEventListener('load', () => { document.title = JSON.stringify({"
        "widths: [...document.images].map(image => image.naturalWidth),"
        "asked: performance.getEntriesByType('resource').map(entry => entry.name).filter(n => !n.startsWith('data:')),"
        "table: document.querySelectorAll('tr').length, wide: document.documentElement.scrollWidth,"
        "mode: document.compatMode }) })</script></body>"
    )
    text = (drawn / "index.html").read_text()
    allowed = text.replace("default-src 'none';", "default-src 'none'; script-src 'unsafe-inline';")
    copy = tmp_path / "probed.html"
    copy.write_text(allowed.replace("</body>", probe))
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"]
    flags += ["--disable-component-update", "--disable-sync", f"--user-data-dir={tmp_path / 'profile'}"]
    done = subprocess.run(
        [CHROMIUM, *flags, "--window-size=1200,900", "--dump-dom", copy.as_uri()],
        capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    title = re.search(r"<title>(.*?)</title>", done.stdout)
    said = json.loads(title.group(1))
    sizes = [Image.open(drawn / f"{name}.png").width for name in ("fan", *(f"answer_{n}" for n in (1, 2, 3, 4)))]
    assert said["widths"] == [*sizes, Image.open(drawn / "calibration.png").width]
    assert said["asked"] == []
    assert said["table"] == len(Parsed(text).rows)
    assert said["wide"] <= 1200
    assert said["mode"] == "CSS1Compat"


@pytest.fixture(scope="module")
def critic(tmp_path_factory):
    folder = tmp_path_factory.mktemp("critic")
    return tiny.save_critic(folder / "critic", tiny.save_base(folder / "base"))


def test_rollouts_are_read_by_the_critic_of_a_folder(critic, tmp_path):
    from verl_dvpo.pictures.rollouts import dump_of_rollouts

    prompts, responses = ["1+1=", "2+2=", "3+3="], ["2", "45", "6 "]
    frame = pd.DataFrame({"prompt": prompts, "response": responses, "reward": [1.0, 0.0, 1.0]})
    frame.to_parquet(tmp_path / "rollouts.parquet")
    dump = dump_of_rollouts(critic, [tmp_path / "rollouts.parquet"], limit=2, step=None, device="cpu")
    assert [answer.prompt for answer in dump.answers] == ["1+1=", "2+2="]  # rows 0 and 3/2 of three
    second = dump.answers[1]
    assert (second.pieces, second.reward) == (("4", "5"), 0.0)
    assert second.realised.tolist() == [0.0, 0.0]
    model = ValueModel.from_pretrained(critic)
    ids = model.tokenizer("2+2=45", add_special_tokens=False)["input_ids"]
    with torch.no_grad():
        outputs = model.module(input_ids=torch.tensor([ids])).logits[0].float().reshape(-1, 2, 5)
    samples = outputs.mean(1).sort(-1).values[3:5].double().numpy()  # the state after "=", and after "4"
    expected = [np.interp(LEVELS, (np.arange(5) + 0.5) / 5, row) for row in samples]
    assert second.quantiles == pytest.approx(np.array(expected), abs=1e-5)
    assert second.heads == pytest.approx(outputs.mean(-1)[3:5].numpy(), abs=1e-5)
    assert command(critic, "--rollouts", tmp_path / "rollouts.parquet", "--out", tmp_path / "pictures") == 0
    assert "critic.value.num_heads" in (tmp_path / "pictures" / "index.html").read_text()


def save_metrics(folder: Path, scores: list[float]) -> Path:
    folder.mkdir(parents=True)
    lines = [{"step": step, "data": {"critic/score/mean": score}} for step, score in enumerate(scores, 1)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def test_runs_that_differ_in_their_seed_are_one_curve(tmp_path):
    from verl_dvpo.pictures.curves import curves

    for seed, scores in ((0, [0.1, 0.2, 0.3]), (1, [0.3, 0.4])):
        save_metrics(tmp_path / f"dvpo__none__s{seed}", scores)
    save_metrics(tmp_path / "ppo", [0.5])
    groups = group_runs([*(str(tmp_path / f"dvpo__none__s{seed}") for seed in (0, 1)), f"other={tmp_path}/p*"])
    assert list(groups) == ["dvpo__none", "other"]
    (group, alone) = curves(groups)["training reward"]
    assert (group.runs, group.steps.tolist(), group.mean.tolist()) == (2, [1, 2], pytest.approx([0.2, 0.3]))
    assert group.low[0] == pytest.approx(0.2 - 12.7062047 * 0.1)  # t with one degree of freedom, error 0.1
    assert (alone.group, alone.steps.tolist()) == ("other", [1])
    runs = [tmp_path / f"dvpo__none__s{seed}" for seed in (0, 1)]
    assert command(*runs, f"other={tmp_path}/p*", "--out", tmp_path / "pictures") == 0
    assert sorted(file.name for file in (tmp_path / "pictures").iterdir()) == ["curves.png", "index.html"]


def test_folders_of_one_name_stay_apart(tmp_path):
    for parent in ("a", "b"):
        (tmp_path / parent / "dvpo").mkdir(parents=True)
    assert list(group_runs([str(tmp_path / parent / "dvpo") for parent in "ab"])) == ["dvpo", "b/dvpo"]


def no_run(folder: Path) -> list[object]:
    return [folder / "nowhere"]


def nothing(folder: Path) -> list[object]:
    return [save_metrics(folder / "run", [1.0])]


def empty_dump(folder: Path) -> list[object]:
    return [made.save_run(folder / "run", Dump(1, ()))]


def broken_dump(folder: Path) -> list[object]:
    run = made.save_run(folder / "run", made.story(), Dump(20, ()))
    (run / "checkpoints" / "values" / "step_20.safetensors").write_bytes(b"{}")
    return [run]


def no_checkpoint(folder: Path) -> list[object]:
    frame = pd.DataFrame({"prompt": ["1"], "response": ["2"], "reward": [1.0]})
    frame.to_parquet(folder / "rollouts.parquet")
    return [save_metrics(folder / "run", [1.0]), "--rollouts", folder / "rollouts.parquet"]


def no_answers(folder: Path) -> list[object]:
    return [made.save_run(folder / "run", made.story()), "--answers", 0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (no_run, "nowhere'; the folder of a run, or NAME=FOLDER, is allowed"),
        (nothing, "train with critic.value.dump_every=10, or give --rollouts"),
        (empty_dump, "there is none with an answer"),
        (broken_dump, r"step_20.safetensors is no whole file of values"),
        (no_checkpoint, "a folder with checkpoints .* is allowed"),
        (no_answers, "answers is 0; an integer >= 1 is allowed"),
    ],
)
def test_bad_input_is_one_line_and_nothing_is_written(arguments, message, tmp_path):
    given = arguments(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(ValueError, match=message) as caught:
        command(*given, "--out", tmp_path / "pictures")
    assert len(str(caught.value)) < 500
    assert sorted(tmp_path.rglob("*")) == before


def test_a_folder_that_is_taken_stays_as_it_was(tmp_path):
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "mine").write_text("mine")
    with pytest.raises(ValueError, match="out is"):
        command(made.save_run(tmp_path / "run", made.story()), "--out", tmp_path / "pictures")
    assert [file.name for file in (tmp_path / "pictures").iterdir()] == ["mine"]
