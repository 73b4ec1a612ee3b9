"""lm/data/readers/tables.py and fields.py: labelled data as it is published, and every fault that it can have."""

import collections
import csv
import gzip
import io
import json
import re
from pathlib import Path

import pytest
from etils import epath
from hypothesis import example, given
from hypothesis import strategies as st

from lm.config import DataConfig
from lm.config.schema import ConfigError
from lm.data.readers import parquet, registry, tables
from lm.data.readers.text import read_jsonl
from lm.data.record import DataError, Fault
from tests import small_sets


def write(path: Path, content: str | bytes) -> epath.Path:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return epath.Path(path)


def without_source(found: list[dict]) -> list[dict]:
    return [{key: value for key, value in record.items() if key != "source"} for record in found]


# Tables ---------------------------------------------------------------------------------------------------------------


def test_a_quote_is_a_character_in_a_tsv(tmp_path):
    path = write(tmp_path / "a.tsv", 'x1\t0\t\t"Some quote\r\nx2\t1\t*\ta " b\n\n')
    found = list(tables.read_table(path, {"2": "label", "4": "text"}))
    assert found == [
        {"label": "0", "text": '"Some quote', "source": f"{path}:1"},
        {"label": "1", "text": 'a " b', "source": f"{path}:2"},
    ]


CELLS = st.lists(
    st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0\ufeff\r"), min_size=1).filter(str.strip),
    min_size=3,
    max_size=3,
)


@given(rows=st.lists(CELLS, min_size=1, max_size=4), quoting=st.sampled_from([csv.QUOTE_MINIMAL, csv.QUOTE_ALL]))
@example(rows=[['a "b"', "c,d", "e\nf"]], quoting=csv.QUOTE_MINIMAL)
def test_what_a_csv_writer_wrote_is_read_back(tmp_path_factory, rows, quoting):
    file = io.StringIO()
    csv.writer(file, quoting=quoting).writerows([["first", "second", "ignored"], *rows])
    path = write(tmp_path_factory.getbasetemp() / "a.csv", file.getvalue())
    found = without_source(list(tables.read_table(path, {"first": "text", "second": "label"})))
    assert found == [{"text": row[0], "label": row[1]} for row in rows]


def test_rows_of_a_csv_are_placed_at_their_first_line(tmp_path):
    path = write(tmp_path / "a.csv", '"a\n\n""b""",0\nc,1\n')
    found = list(tables.read_table(path, {"1": "text", "2": "label"}))
    assert [record["source"] for record in found] == [f"{path}:1", f"{path}:4"]
    assert found[0]["text"] == 'a\n\n"b"'


def test_without_rename_the_header_names_the_fields_and_a_packed_file_is_read(tmp_path):
    path = write(tmp_path / "a.tsv.gz", gzip.compress(b"text\tlabel\nhi\t1\n"))
    assert list(tables.read_table(path, {})) == [{"text": "hi", "label": "1", "source": f"{path}:2"}]


TABLE_FAULTS = [
    ("a.tsv", b"a\t1\n", "b\t1\t2", "wrong number of columns", 2, "found 3; expected 2, as in the first row"),
    ("a.tsv", b"a\t1\n", "b", "wrong number of columns", 2, "found 1; expected 2"),
    ("a.tsv", b"a\t1\n", " \t1", "empty text", 2, "'text' is str ' '"),
    ("a.tsv", b"a\t1\n", b"b\xe9\t0", "invalid UTF-8", 2, "0xe9"),
    ("a.tsv", b"a\t1\n", b"b\0\t0", "NUL", 2, "U+0000"),
    ("a.csv", b"a,1\n", 'b,"1" x', "malformed CSV", 2, "RFC 4180"),
    ("a.csv", b"a,1\n", 'b"\n"c,1', "malformed CSV", 2, "RFC 4180"),
    ("a.csv", b"a,1\n", b'"b\n\xe9",1', "invalid UTF-8", 3, "0xe9"),
]


@pytest.mark.parametrize(("name", "before", "row", "kind", "line", "says"), TABLE_FAULTS)
def test_a_bad_row_is_a_fault_with_its_place_and_reading_goes_on(tmp_path, name, before, row, kind, line, says):
    row = row.encode() if isinstance(row, str) else row
    path = write(tmp_path / name, before + row + b"\n" + before)
    first, fault, last = tables.read_table(path, {"1": "text", "2": "label"})
    assert (fault.kind, fault.where) == (kind, f"{path}:{line}") and says in fault.message
    assert without_source([first, last]) == [{"text": "a", "label": "1"}] * 2


@pytest.mark.parametrize(
    ("name", "content", "rename", "says"),
    [
        ("a.tsv", "sentence1\tlabel\n", {"sentence": "text"}, "a.tsv:1: .*expected 'sentence', .*'sentence1'?"),
        ("a.tsv", "text\ttext\nx\ty\n", {}, "a.tsv:1: .* more than one column 'text'"),
        ("a.tsv", "x\ty\n", {"3": "text"}, "a.tsv:1: .*found '1', '2'; expected '3'"),
        ("a.tsv", b"\xff\n", {}, "a.tsv:1: invalid UTF-8"),
        ("a.csv", 'text,b\nc,"d\ne,f\n', {}, "a.csv:2: a quote opens a field here that the file never closes"),
    ],
)
def test_a_table_without_its_columns_is_an_error(tmp_path, name, content, rename, says):
    with pytest.raises(DataError, match=says):
        list(tables.read_table(write(tmp_path / name, content), rename))


@pytest.mark.parametrize("content", ["", "\n\r\n", "text\tlabel\n"])
def test_an_empty_table_is_a_fault(tmp_path, content):
    (fault,) = tables.read_table(write(tmp_path / "a.tsv", content), {})
    assert fault.kind == "empty file"


# CoNLL ----------------------------------------------------------------------------------------------------------------

NER = {"1": "token", "2": "tag"}


def test_conll_columns_of_two(tmp_path):
    text = "-DOCSTART-\tO\n\n\nIn\tO\n1-2\tO\n#\tB-X\n\n# a comment\nNew York\tB-Y\r\n-\tO"
    path = write(tmp_path / "a.tsv", text)
    assert list(tables.read_conll(path, NER)) == [
        {"words": ["In", "1-2", "#"], "tags": ["O", "O", "B-X"], "source": f"{path}:4"},
        {"words": ["New York", "-"], "tags": ["B-Y", "O"], "source": f"{path}:9"},
    ]


def test_conll_u(tmp_path):
    rows = ["1-2\tzum\t_\t_", "1\tzu\tzu\tADP", "2\tdem\tder\tDET", "2.1\tnull\t_\tVERB", "3\t# 5\t5\tNUM"]
    path = write(tmp_path / "a.conllu", "# text = zum # 5\n# a\n" + "\n".join(rows) + "\n\n# a b c d\n1\tx\tx\tX\n")
    assert without_source(list(tables.read_conll(path, {"2": "token", "4": "tag"}))) == [
        {"words": ["zu", "dem", "# 5"], "tags": ["ADP", "DET", "NUM"]},
        {"words": ["x"], "tags": ["X"]},
    ]


def test_conll_columns_by_spaces(tmp_path):
    path = write(tmp_path / "a.conll", "-DOCSTART- -X- O O\n\nEU NNP  I-NP B-ORG\n# # I-NP O\n")
    assert without_source(list(tables.read_conll(path, {"1": "token", "4": "tag"}))) == [
        {"words": ["EU", "#"], "tags": ["B-ORG", "O"]}
    ]


@pytest.mark.parametrize(
    ("line", "kind", "says"),
    [
        (b"word", "wrong number of columns", "found 1; expected 2 as above"),
        (b"word\tO\tO", "wrong number of columns", "found 3; expected 2 as above"),
        (b"word\t", "empty text", "tags[0]"),
        (b"\tO", "empty text", "words[0]"),
        (b"w\xff\tO", "invalid UTF-8", "0xff"),
    ],
)
def test_a_bad_word_is_a_fault_of_its_sentence_at_its_own_line(tmp_path, line, kind, says):
    path = write(tmp_path / "a.tsv", b"a\tO\n\nb\tO\n" + line + b"\nc\tO\n\nd\tO\n")
    first, fault, last = tables.read_conll(path, NER)
    assert (fault.kind, fault.where) == (kind, f"{path}:4") and says in fault.message
    assert [first["words"], last["words"]] == [["a"], ["d"]]


def test_conll_columns_that_are_not_there(tmp_path):
    path = write(tmp_path / "a.tsv", "a\tO\n")
    (fault,) = tables.read_conll(path, {"1": "token", "3": "tag"})
    assert "found 2; expected column 3 too" in fault.message
    for rename in (
        {},
        {"1": "token"},
        {"1": "text", "2": "tag"},
        {"word": "token", "2": "tag"},
        {"0": "token", "2": "tag"},
    ):
        with pytest.raises(ConfigError, match=r"'data.rename' is .*expects such as \(\('1', 'token'\)"):
            list(tables.read_conll(path, rename))
    (fault,) = tables.read_conll(write(tmp_path / "b.tsv", "# nothing\n\n"), NER)
    assert fault.kind == "empty file"


# SQuAD ----------------------------------------------------------------------------------------------------------------


def squad(context: str, answers: object, **more: object) -> str:
    asked = {"id": "q1", "question": "What?", "answers": answers} | more
    asked = {key: value for key, value in asked.items() if value is not None}
    return json.dumps({"data": [{"title": "T", "paragraphs": [{"context": context, "qas": [asked]}]}]})


def test_squad(tmp_path):
    path = write(tmp_path / "a.json", squad("Zwölf\r\nÄpfel.", [{"text": "Äpfel", "answer_start": 7}]))
    assert list(tables.read_squad(path)) == [
        {
            "id": "q1",
            "question": "What?",
            "context": "Zwölf\nÄpfel.",
            "answers": [{"text": "Äpfel", "answer_start": 6}],
            "source": f"{path}:data[0].paragraphs[0].qas[0]",
        }
    ]


@pytest.mark.parametrize(
    ("answers", "kind", "says"),
    [
        (
            [{"text": "pears", "answer_start": 5}],
            "misplaced answer",
            "at 5 'context' has str 'apple'; expected the answer",
        ),
        ([{"text": "apples", "answer_start": 4}], "misplaced answer", "expected the answer str 'apples'"),
        ([{"text": "apples", "answer_start": -1}], "offset outside", "expected one in the text's 0 to 13"),
        ([{"text": "apples", "answer_start": 14}], "offset outside", "'answers[0].answer_start' is 14"),
        ([{"text": "apples", "answer_start": "7"}], "wrong type", "expected a whole number"),
        ([{"text": "", "answer_start": 0}], "empty text", "answers[0].text"),
        ([{"text": "a"}], "missing field", "expected 'answer_start'"),
        ("apples", "wrong type", "'answers' is str 'apples'; expected a list of objects"),
        (None, "missing field", "expected 'answers'"),
    ],
)
def test_an_answer_that_is_not_where_it_should_be_is_a_fault(tmp_path, answers, kind, says):
    (fault,) = tables.read_squad(write(tmp_path / "a.json", squad("Some apples .", answers)))
    assert fault.kind == kind and says in fault.message
    assert fault.where == f"{tmp_path / 'a.json'}:data[0].paragraphs[0].qas[0]"


PLAUSIBLE = {"plausible_answers": [{"text": "pears", "answer_start": 99}]}


@pytest.mark.parametrize(
    ("answers", "more"),
    [
        ([], {"is_impossible": True}),
        ([], {"is_impossible": True} | PLAUSIBLE),
        ([], {}),  # as Hugging Face's squad_v2, without the flag
        ({"text": [], "answer_start": []}, {}),
        ([{"text": "apples", "answer_start": 5}], {"is_impossible": False}),
        ([{"text": "apples", "answer_start": 5}], {"is_impossible": False} | PLAUSIBLE),
    ],
)
def test_squad_2(tmp_path, answers, more):
    (found,) = tables.read_squad(write(tmp_path / "a.json", squad("Some apples .", answers, **more)))
    assert found["answers"] == (answers if isinstance(answers, list) else []) and "plausible_answers" not in found


def test_questions_without_an_answer_in_columns(tmp_path):
    """As squad_v2 is published: an object of two lists, both empty."""
    rows = [
        {"id": str(i), "question": "What?", "context": "Some apples .", "answers": {"text": texts, "answer_start": at}}
        for i, (texts, at) in enumerate([(["apples"], [5]), ([], [])])
    ]
    path = small_sets.write_parquet(tmp_path / "a.parquet", small_sets.table(rows))
    found = [record["answers"] for record in parquet.read_parquet(epath.Path(path), {})]
    assert found == [[{"text": "apples", "answer_start": 5}], []]


@pytest.mark.parametrize(
    ("answers", "flag"),
    [([], False), ([{"text": "apples", "answer_start": 5}], True), ([], "true"), ([], 1)],
)
def test_answers_that_contradict_their_flag_are_a_fault(tmp_path, answers, flag):
    (fault,) = tables.read_squad(write(tmp_path / "a.json", squad("Some apples .", answers, is_impossible=flag)))
    assert fault.kind == "contradicting answers"
    assert f"'is_impossible' is {type(flag).__name__} {flag!r}, and there are {len(answers)} answers" in fault.message


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("[", "malformed JSON"),
        ("[]", "no list 'data'"),
        ('{"data": [{"paragraphs": 3}]}', r"data\[0\]: no list 'paragraphs'"),
        ('{"data": [{"paragraphs": [{"context": "a"}]}]}', r"data\[0\].paragraphs\[0\]: no list 'qas'"),
        (b"\xff", "0xff"),
    ],
)
def test_a_file_that_is_not_squad_is_an_error(tmp_path, content, says):
    with pytest.raises(DataError, match=says):
        list(tables.read_squad(write(tmp_path / "a.json", content)))


# Labelled JSON lines --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ({"text": "a", "label": 1, "id": 3}, {"text": "a", "label": "1"}),
        ({"text": "a", "label": "yes"}, {"text": "a", "label": "yes"}),
        ({"text": "a", "label": None}, {"text": "a", "label": None}),
        ({"text": "a", "label": float("nan")}, {"text": "a", "label": None}),
        ({"text": "a", "label": " "}, {"text": "a", "label": None}),
        ({"text": "a", "label": True}, {"text": "a", "label": True}),
        ({"text": "a", "text_pair": "b", "label": 3.75}, {"text": "a", "text_pair": "b", "label": "3.75"}),
        ({"text": "a", "text_pair": "b"}, {"text": "a", "text_pair": "b"}),
        ({"words": ["a", "b"], "tags": ["O", 1]}, {"words": ["a", "b"], "tags": ["O", "1"]}),
        ({"text": "ab", "entities": []}, {"text": "ab", "entities": []}),
        (
            {"text": "a\r\nb c", "entities": [{"start": 3, "end": 6, "label": "X", "id": 1}]},
            {"text": "a\nb c", "entities": [{"start": 2, "end": 5, "label": "X"}]},
        ),
        (
            {"question": "q", "context": "c d", "answers": [{"text": "d", "answer_start": 2}], "id": 7},
            {"id": "7", "question": "q", "context": "c d", "answers": [{"text": "d", "answer_start": 2}]},
        ),
    ],
)
def test_jsonl_forms_of_labelled_tasks(tmp_path, value, expected):
    path = write(tmp_path / "a.jsonl", json.dumps(value))
    assert list(read_jsonl(path, {})) == [{**expected, "source": f"{path}:1"}]


@pytest.mark.parametrize(
    ("value", "kind", "says"),
    [
        ({"words": ["a"], "tags": [True]}, "wrong type", "'tags[0]' is bool True; expected a string or a number"),
        ({"text": "a", "label": [1]}, "wrong type", "'label' is list"),
        ({"text": "a", "label": float("inf")}, "wrong type", "'label' is float inf"),
        ({"words": ["a"], "tags": [""]}, "empty text", "'tags[0]'"),
        ({"text": "a", "text_pair": 3}, "wrong type", "'text_pair' is int 3"),
        ({"words": ["a"], "tags": []}, "wrong type", "'tags' is list []"),
        ({"words": ["a", "b"], "tags": ["O"]}, "wrong length", "found 2 words and 1 tags"),
        ({"words": ["a", 3], "tags": ["O", "O"]}, "wrong type", "'words[1]' is int 3"),
        ({"text": "ab", "entities": {}}, "wrong type", "'entities' is dict {}"),
        ({"text": "ab", "entities": [3]}, "wrong type", "'entities[0]' is int 3"),
        ({"text": "ab", "entities": [{"start": 0, "end": 3, "label": "X"}]}, "offset outside", "entities[0].end' is 3"),
        ({"text": "ab", "entities": [{"start": -1, "end": 1, "label": "X"}]}, "offset outside", "start' is -1"),
        ({"text": "ab", "entities": [{"start": 1, "end": 1, "label": "X"}]}, "misplaced entity", "from 1 to 1"),
        ({"text": "ab", "entities": [{"start": 0, "end": 1}]}, "missing field", "expected 'label'"),
    ],
)
def test_a_bad_label_is_a_fault(tmp_path, value, kind, says):
    (fault,) = read_jsonl(write(tmp_path / "a.jsonl", json.dumps(value)), {})
    assert fault.kind == kind and says in fault.message and "expected" in fault.message


# Real files -----------------------------------------------------------------------------------------------------------


def test_real_tables(shared_data):
    def load(path: Path, **rename: str) -> list[dict]:
        cfg = DataConfig(format="table", path=str(path), rename=tuple((k.strip("_"), v) for k, v in rename.items()))
        split = registry.load(cfg)
        return sorted(split.train + split.valid, key=lambda record: int(record["source"].rpartition(":")[2]))

    cola = load(shared_data("cola") / "train.tsv", _2="label", _4="text")
    expected = [line.split("\t") for line in (shared_data("cola") / "train.tsv").read_text().splitlines()]
    assert [(r["label"], r["text"]) for r in cola] == [(row[1], row[3]) for row in expected] and len(cola) == 8551
    rte = load(shared_data("rte") / "dev.tsv", sentence1="text", sentence2="text_pair", label="label")
    assert len(rte) == 277 and set(rte[0]) == {"text", "text_pair", "label", "source", "identity"}
    stsb = load(shared_data("stsb") / "stsb-en-dev.csv", _1="text", _2="text_pair", _3="label")
    with (shared_data("stsb") / "stsb-en-dev.csv").open(newline="") as file:
        assert [[r["text"], r["text_pair"], r["label"]] for r in stsb] == list(csv.reader(file))
    assert len(stsb) == 1500 and all(0 <= float(r["label"]) <= 5 for r in stsb)


def test_real_conll(shared_data):
    def load(path: Path, rename: dict[str, str]) -> list[dict]:
        found = list(tables.read_conll(epath.Path(path), rename))
        assert not [item for item in found if isinstance(item, Fault)]
        return found

    bc5cdr = load(shared_data("bc5cdr") / "train.tsv", NER)
    tags = collections.Counter(tag for record in bc5cdr for tag in record["tags"])
    lines = (shared_data("bc5cdr") / "train.tsv").read_text().splitlines()
    assert len(bc5cdr) == 4560 and tags == collections.Counter(line.split("\t")[1] for line in lines if line)
    ewt = load(shared_data("ud_ewt") / "en_ewt-ud-dev.conllu", {"2": "token", "4": "tag"})
    text = (shared_data("ud_ewt") / "en_ewt-ud-dev.conllu").read_text()
    words = re.findall(r"^\d+\t(.*?)\t.*?\t(.*?)\t", text, re.MULTILINE)
    assert [pair for r in ewt for pair in zip(r["words"], r["tags"], strict=True)] == words
    assert len(ewt) == 2001


def test_real_squad(shared_data):
    split = registry.load(
        DataConfig(format="squad", path=str(shared_data("xquad") / "xquad.en.json"), eval_fraction=0.2)
    )
    assert len(split.train) + len(split.valid) == 1190 and 150 < len(split.valid) < 330
    german = list(tables.read_squad(epath.Path(shared_data("xquad") / "xquad.de.json")))
    assert len(german) == 1190 and not any(isinstance(item, Fault) for item in german)
    marked = [record for record in german if "\ufeff" in record["context"]]  # offsets of answers count it
    assert marked and all(
        record["context"][answer["answer_start"] :].startswith(answer["text"])
        for record in marked
        for answer in record["answers"]
    )


@pytest.mark.parametrize("language", ["en", "de"])
def test_xquad_is_read_whole(shared_data, language):
    """Its languages share their ids; a context of the German one has U+FEFF inside."""
    path = shared_data("xquad") / f"xquad.{language}.json"
    found = list(tables.read_squad(epath.Path(path)))
    asked = [
        {"id": question["id"], "question": question["question"], "context": paragraph["context"]}
        for article in json.loads(path.read_text())["data"]
        for paragraph in article["paragraphs"]
        for question in paragraph["qas"]
    ]
    assert [{key: record[key] for key in ("id", "question", "context")} for record in found] == asked
    assert len(found) == 1190 and all(len(record["answers"]) == 1 for record in found)


# One rule for all formats ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rename", [{"premise": "text"}, {"premise": "text", "label": "label"}])
def test_columns_that_are_not_renamed_keep_their_names_in_every_format(tmp_path, rename):
    rows = [{"id": f"{n}", "premise": f"a {n}", "text_pair": f"b {n}", "label": "yes", "note": ""} for n in range(3)]
    expected = [{"text": f"a {n}", "text_pair": f"b {n}", "label": "yes"} for n in range(3)]
    with (tmp_path / "a.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    lines = ["\t".join(row.values()) for row in rows]
    write(tmp_path / "a.tsv", "\n".join(["\t".join(rows[0]), *lines]))
    write(tmp_path / "a.jsonl", "\n".join(map(json.dumps, rows)))
    assert without_source(list(tables.read_table(epath.Path(tmp_path / "a.csv"), rename))) == expected
    assert without_source(list(tables.read_table(epath.Path(tmp_path / "a.tsv"), rename))) == expected
    assert without_source(list(read_jsonl(epath.Path(tmp_path / "a.jsonl"), rename))) == expected
