"""Tables of samples and the page that shows them: nothing lost, everything escaped, bounded, replaced whole."""

import json
import re
from html.parser import HTMLParser

from hypothesis import given
from hypothesis import strategies as st

from megapref import samples
from megapref.samples import cut_after, differences, page, write_table

PAIR = {"prompt": "<b>p</b>", "first": "one & two", "second": "", "score_first": 1.5, "score_second": None, "preference": 0.75}
ROW = {"set": "demo", "prompt": "what is it", "policy": "the cat sat on the mat", "opponent": "no", "against": "reference", "finished": True}
ROW |= {"score_policy": 0.5, "score_opponent": float("nan"), "preference": 1.0}


class Balanced(HTMLParser):
    """Fails where tags do not close in order; has the text."""

    def __init__(self, html: str):
        super().__init__()
        self.open, self.text, self.attributes = [], "", []
        self.feed(html)
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.attributes += attributes
        if tag not in ("meta", "!doctype"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def test_page_shows_pairs_as_they_are(tmp_path):
    rows = [PAIR | {"judge": "<script>A</script> it is"}, PAIR | {"preference": None}, PAIR | {"preference": 0.5}]
    assert write_table(tmp_path, 10, rows) == "step"
    html = (tmp_path / "completions.html").read_text()
    text = Balanced(html).text
    for words in ("<b>p</b>", "one & two", "score +1.5", "score –", "better (P 0.75)", "<script>A</script> it is", "no verdict", "tie", "step 10"):
        assert words in text, words
    assert "<script" not in html and "http" not in html and "src=" not in html  # nothing runs, nothing is fetched
    assert not list(tmp_path.rglob(".*"))


def test_page_shows_how_answers_change(tmp_path):
    for step, answer in ((0, "the cat sat on the mat"), (5, "the cat sat on the chair"), (10, "")):
        assert write_table(tmp_path, step, [ROW | {"policy": answer, "finished": bool(answer)}]) == "evaluation"
    html = (tmp_path / "completions.html").read_text()
    Balanced(html)
    assert "the cat sat on the<del> mat</del><ins> chair</ins></p>" in html
    assert re.findall(r"<b>step (\d+)</b>", html) == ["10", "5", "0"] and html.count("cut off") == 1


def test_page_is_bounded_and_says_so(tmp_path):
    for step in range(1, samples.TABLES + 5):
        write_table(tmp_path, step, [PAIR | {"first": "x" * 10 * samples.CHARACTERS}] * 20)
        write_table(tmp_path, step, [ROW | {"prompt": f"{number}"} for number in range(40)])
    html = page(tmp_path)
    assert len(html) < samples.TABLES * samples.ROWS * (samples.CHARACTERS + 2000) + samples.PROMPTS * samples.EVALUATIONS * 1000 + 20_000
    text = Balanced(html).text
    assert "newest\n12 of 16 tables" in text and "6 of 16\nevaluations, 16 of 40 prompts" in text and "(36,000 more characters)" in text
    assert re.findall(r"<b>step (\d+)</b>", html)[:6] == ["16", "15", "14", "13", "12", "1"]


def test_steps_that_are_done_again_are_taken_out(tmp_path):
    for step in (0, 1, 2, 3):
        write_table(tmp_path, step, [ROW])
        write_table(tmp_path, step, [PAIR])
    cut_after(tmp_path, 1)
    names = sorted(path.name for path in (tmp_path / "samples").iterdir())
    assert names == ["evaluation_000000.jsonl", "evaluation_000001.jsonl", "step_000000.jsonl", "step_000001.jsonl"]
    assert json.loads((tmp_path / "samples" / names[0]).read_text()) == ROW | {"score_opponent": None}


def test_resumed_run_with_other_validation_prompts(tmp_path):
    write_table(tmp_path, 0, [ROW | {"prompt": "other"}, ROW])
    write_table(tmp_path, 5, [ROW, ROW, ROW])
    assert re.findall(r"<b>step (\d+)</b>", page(tmp_path)) == ["5", "5", "0", "5"]


words = st.lists(st.sampled_from(["the", "cat", " sat\n", "on", "mat "]), max_size=12).map(" ".join)


@given(words, words)
def test_differences_make_both_texts(before, after):
    runs = differences(before, after)
    assert "".join(text for kind, text in runs if kind != "out") == after
    assert "".join(text for kind, text in runs if kind != "in") == before
    assert all(kind == "same" for kind, _ in differences(before, before))
