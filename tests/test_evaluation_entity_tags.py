"""lm/evaluation/entity_tags.py: which labels are entity tags, and which scheme they follow."""

import pytest

from lm.config.schema import ConfigError
from lm.evaluation import entity_tags

IOBES = {"O": "O", "B-X": "B-X", "I-X": "I-X", "E-X": "E-X", "S-X": "S-X"}


@pytest.mark.parametrize(
    ("labels", "scheme", "tags", "strict"),
    [
        (("O", "B-X", "I-X"), "auto", ("O", "B-X", "I-X"), ("IOB2", "IOB1")),
        (("B-X", "I-X"), "auto", ("B-X", "I-X"), ("IOB2", "IOB1")),
        (("O", "B-X", "I-X"), "IOB1", ("O", "B-X", "I-X"), ("IOB1",)),
        (("O", "I-X"), "auto", ("O", "I-X"), ("IOB1",)),
        (("O", "B-X"), "auto", ("O", "B-X"), ("IOB2",)),
        (("O", "B-X", "I-X", "E-X", "S-X"), "auto", ("O", "B-X", "I-X", "E-X", "S-X"), ("IOBES",)),
        (("O", "B-X", "I-X", "E-X", "S-X"), "IOBES", ("O", "B-X", "I-X", "E-X", "S-X"), ("IOBES",)),
        (("O", "B-X", "I-X", "L-X", "U-X"), "auto", ("O", "B-X", "I-X", "E-X", "S-X"), ("IOBES",)),
        (("O", "B-X", "I-X", "L-X", "U-X"), "BILOU", ("O", "B-X", "I-X", "E-X", "S-X"), ("IOBES",)),
        (("B", "M", "E", "S"), "auto", ("B-_", "I-_", "E-_", "S-_"), ("IOBES",)),
        (("B", "M", "E", "S"), "IOBES", ("B-_", "I-_", "E-_", "S-_"), ("IOBES",)),
        (("O", "B-X", "M-X", "E-X", "W-X"), "auto", ("O", "B-X", "I-X", "E-X", "S-X"), ("IOBES",)),
        (("O", "B", "I"), "auto", ("O", "B-_", "I-_"), ("IOB2", "IOB1")),
        (("O", "X-B", "X-I"), "auto", ("O", "B-X", "I-X"), ("IOB2", "IOB1")),
        (("O", "B_a-b", "I_a-b"), "auto", ("O", "B-a-b", "I-a-b"), ("IOB2", "IOB1")),
        (("O", "I-X", "E-X"), "auto", ("O", "I-X", "E-X"), ()),  # IOE1 or IOE2
    ],
)
def test_labels_that_are_entity_tags(labels, scheme, tags, strict):
    found = entity_tags.read(labels, scheme)
    assert tuple(found[label] for label in labels) == tags
    assert entity_tags.strict_schemes(found.values(), scheme) == strict


@pytest.mark.parametrize(
    "labels",
    [("NOUN", "VERB"), ("O", "PER", "LOC"), ("S", "I"), ("O",), ("LS", "UH", "B"), ("^", "O", "S", "L", "M", "E", "N")],
)
def test_labels_that_are_not_entity_tags(labels):
    assert entity_tags.read(labels) == {}
    with pytest.raises(ConfigError, match=r"'task\.labels'.*of 'task.entity_scheme' IOB2.*task.entity_scheme=none"):
        entity_tags.read(labels, "IOB2")


@pytest.mark.parametrize(
    ("labels", "scheme", "says"),
    [
        (("O", "B-X", "I-X", "X"), "auto", "'X' is not an entity tag"),
        (("O", "B-X", "X-I"), "auto", "'X-I' is not an entity tag"),
        (("O", "b-per", "i-per"), "auto", "'b-per' is not an entity tag"),
        (("O", "B-X", "E-X", "U-X"), "auto", "they have the letters B, E, U"),
        (("O", "B-X", "I-X", "E-X", "S-X"), "IOB2", "they have the letters B, E, I, S; .*'task.entity_scheme' IOB2"),
        (("O", "B-X", "I-X", "E-X", "S-X"), "BILOU", "they have the letters"),
    ],
)
def test_labels_of_no_scheme_are_refused(labels, scheme, says):
    with pytest.raises(ConfigError, match=says):
        entity_tags.read(labels, scheme)
    assert entity_tags.read(labels, "none") == {}


@pytest.mark.parametrize(
    ("sentences", "scheme"),
    [
        (["B-X I-X O", "B-Y B-Y"], "IOB2"),
        (["I-X I-X O", "I-Y B-Y", "I-X I-Y"], "IOB1"),
        (["O O", "O"], "IOB2"),
        (["B-X I-X O B-X I-X I-Y"], "IOB2"),  # one slip
        (["I-X O I-X O B-Y", "I-X"], "IOB1"),  # one slip
    ],
)
def test_the_scheme_is_decided_by_the_tags(sentences, scheme):
    assert entity_tags.tell(("IOB2", "IOB1"), map(str.split, sentences)) == scheme
    assert entity_tags.tell(("IOBES",), map(str.split, sentences)) == "IOBES"
