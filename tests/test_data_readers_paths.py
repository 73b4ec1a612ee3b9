"""Which files of a folder are read, which are named as not read, and which are refused."""

import os
import socket
import tarfile
from pathlib import Path

import numpy as np
import pytest
from etils import epath
from PIL import Image

from lm.config import DataConfig
from lm.data.readers import paths, registry, text
from lm.data.record import DataError, Wanted


def write(folder: Path, *names: str, content: bytes = b"some text") -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content + name.encode())


def report(path: Path | str, **options) -> str:
    return registry.load(DataConfig(path=str(path), format="text", eval_fraction=0.3, **options)).report


def test_files_of_a_folder_that_are_not_read_are_named_with_counts(tmp_path):
    write(tmp_path, "a.txt", "b.TXT", "c.md.gz", "d.txt", "sub/e.csv", "f.csv", "README", "sub/g.tar.gz", ".git/config")
    write(tmp_path, *(f"{n}.pdf" for n in range(5)), ".hidden.txt")
    (tmp_path / "c.md.gz").unlink()
    (tmp_path / "link").symlink_to(tmp_path / "sub")
    assert (
        f"12 files in {tmp_path} not read: 5 .pdf (0.pdf, 1.pdf, 2.pdf, ...), 2 .csv (f.csv, sub/e.csv), "
        "2 hidden, 1 .tar.gz (sub/g.tar.gz), 1 folder (link/), 1 without ending (README)"
    ) in report(tmp_path)


def test_what_is_held_out_is_read_and_a_folder_without_other_files_says_nothing(tmp_path):
    write(tmp_path, "train/a.txt", "train/b.txt", "test/c.txt")
    assert "not read" not in report(tmp_path / "train", eval_path=str(tmp_path / "test"))
    write(tmp_path, "test/d.csv")
    assert f"1 file in {tmp_path}/test not read: 1 .csv (d.csv)" in report(
        tmp_path / "train", eval_path=str(tmp_path / "test")
    )


def test_folders_that_a_glob_matches_are_named(tmp_path):
    write(tmp_path, "a.txt", "b.txt", "c.txt/d.txt")
    assert "1 file" in (found := report(tmp_path / "*.txt")) and "not read: 1 folder (c.txt/)" in found


def test_a_folder_named_like_a_file_is_walked(tmp_path):
    write(tmp_path, "a.txt/b.txt", "a.txt/c.txt")
    found = paths.find_files(str(tmp_path), (".txt",))
    assert [str(path.relative_to(tmp_path)) for path in found] == ["a.txt/b.txt", "a.txt/c.txt"]


def test_interactions_name_what_they_do_not_read(tmp_path):
    rows = "".join(f"u{u},i{i},{i}\n" for u in range(3) for i in range(4))
    (tmp_path / "a.csv").write_text(f"user,item,time\n{rows}")
    write(tmp_path, "notes.doc")
    split = registry.load(DataConfig(path=str(tmp_path), format="interactions"))
    assert f"1 file in {tmp_path} not read: 1 .doc (notes.doc)" in split.report


def test_files_of_other_kinds_among_images_are_named(tmp_path):
    for number in range(6):
        pixels = np.full((4, 4, 3), 40 * number, np.uint8)
        (tmp_path / "cat").mkdir(exist_ok=True)
        Image.fromarray(pixels).save(tmp_path / "cat" / f"{number}.png")
    write(tmp_path, "cat/notes.txt", "LICENSE")
    cfg = DataConfig(path=str(tmp_path), format="images", eval_fraction=0.3)
    wanted = Wanted(image_shape=(4, 4, 3))
    found = registry.load(cfg, wanted).report
    assert f"2 files in {tmp_path} not read: " in found
    assert "1 .txt (cat/notes.txt)" in found and "1 without ending (LICENSE)" in found
    with tarfile.open(tmp_path / "all.tar", "w") as tar:
        for path in sorted((tmp_path / "cat").iterdir()):
            tar.add(path, f"cat/{path.name}")
    tarred = registry.load(DataConfig(**{**vars(cfg), "path": str(tmp_path / "all.tar")}), wanted)
    assert f"1 file in {tmp_path}/all.tar not read: 1 .txt (cat/notes.txt)" in tarred.report
    assert len(tarred.train) + len(tarred.valid) == 6


# FIFOs, sockets, devices ----------------------------------------------------------------------------------------------


@pytest.fixture(params=["FIFO", "socket", "device"])
def special(request, tmp_path):
    """(what it is called, a path that is one)"""
    path = tmp_path / "other" / "x"
    path.parent.mkdir()
    if request.param == "FIFO":
        os.mkfifo(path)
        yield "FIFO", path
    elif request.param == "socket":
        cwd = os.getcwd()
        os.chdir(path.parent)  # a socket's name may not be long
        with socket.socket(socket.AF_UNIX) as found:
            found.bind("x")
            os.chdir(cwd)
            yield "socket", path
    else:
        yield "device", Path("/dev/zero")


@pytest.mark.parametrize("name", ["text", "jsonl", "parquet", "arrow", "array_record", "images", "interactions"])
def test_a_fifo_a_socket_or_a_device_is_refused_by_name_and_never_opened(tmp_path, special, name):
    kind, path = special
    suffix = {"text": ".txt", "interactions": ".csv", "images": ".png"}.get(name, f".{name}")
    folder = tmp_path / "data"
    write(folder, f"a{suffix}", f"b{suffix}")
    (folder / f"c{suffix}").symlink_to(path)
    for given in (path, folder / f"c{suffix}", folder, folder / f"*{suffix}"):
        place = path if given == path else folder / f"c{suffix}"
        with pytest.raises(DataError, match=rf"{place} is a .*{kind}.*; expected a regular file"):
            registry.load(DataConfig(path=str(given), format=name))


@pytest.mark.parametrize(
    "name", ["text", "jsonl", "parquet", "arrow", "array_record", "images", "interactions", "squad"]
)
def test_links_that_lead_in_a_circle_are_one_line_and_folders_are_not_entered_twice(tmp_path, name):
    suffix = {"text": ".txt", "interactions": ".csv", "images": ".png", "squad": ".json"}.get(name, f".{name}")
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / f"a{suffix}").symlink_to(f"b{suffix}")
    (folder / f"b{suffix}").symlink_to(f"a{suffix}")
    (tmp_path / "circle").symlink_to("circle")
    for given in (folder, folder / f"a{suffix}", tmp_path / "circle", tmp_path / "circle" / "below"):
        with pytest.raises(DataError, match=rf"{given}.*(no such file|symbolic links)"):
            registry.load(DataConfig(path=str(given), format=name))


def test_a_folder_that_holds_a_link_to_itself_is_read_once(tmp_path):
    write(tmp_path / "data", *(f"{number}.txt" for number in range(9)))
    (tmp_path / "data" / "itself").symlink_to(tmp_path / "data")
    found = registry.load(DataConfig(path=str(tmp_path / "data"), format="text"))
    assert "read 9 records of 9 files" in found.report and "not read: 1 folder (itself/)" in found.report


def test_a_side_of_a_parallel_corpus_and_the_labels_of_images_may_be_no_fifo_either(tmp_path):
    write(tmp_path, "a.en", "a-images-idx3-ubyte")
    os.mkfifo(tmp_path / "a.de")
    os.mkfifo(tmp_path / "a-labels-idx1-ubyte")
    with pytest.raises(DataError, match=r"a.de is a FIFO"):
        registry.load(DataConfig(path=str(tmp_path / "a.{en,de}"), format="parallel"))
    with pytest.raises(DataError, match=r"a-labels-idx1-ubyte is a FIFO"):
        next(text.chunks(epath.Path(tmp_path / "a-labels-idx1-ubyte")))
