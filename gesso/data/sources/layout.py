"""Layout of a folder or an archive: what each of its files is, and which images, classes and captions it holds.

Every file is used or counted in a note. Sub-folders are, in this order:

1. splits, if one is called train and another val or test: the images of train are read, the others are held out;
2. classes, if there are no images beside them and no metadata file or dataset.json names captions or classes;
3. parts of one set without classes.

Legend: N images.
"""

import os
import re
import shlex
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from gesso import untrusted
from gesso.data.sources import decode
from gesso.data.sources.base import (
    IMAGE_SUFFIXES,
    caption_notes,
    format_names,
    numbered_class_names,
    validate_labels,
)
from gesso.data.sources.metadata import METADATA_FILES, metadata_labels, parse_dataset_json, read_metadata
from gesso.errors import UsageError, install_command

HEIF_SUFFIXES = (".heic", ".heif", ".hif")
CAPTION_SUFFIXES = (".txt", ".json")
"""Suffixes of a caption file beside an image; the first that is there is read."""
KNOWN_SUFFIXES = (
    *CAPTION_SUFFIXES, ".jsonl", ".csv", ".tsv", ".md", ".yaml", ".yml", ".xml", ".html", ".pdf", ".py", ".tar",
    ".parquet", ".zip", ".gz", ".npy", ".npz", ".safetensors", ".pt", ".mp4", ".mov", ".avi", ".svg", ".lock", ".log",
)  # fmt: skip
"""Suffixes of files that are no images: their content is not looked at."""
SYSTEM_NAMES = frozenset(
    ("@eaDir", "__MACOSX", "#recycle", "$RECYCLE.BIN", "System Volume Information", "lost+found", "__pycache__")
)
"""Folders that operating systems and file servers make."""
SYSTEM_FILES = frozenset(("Thumbs.db", "desktop.ini", "Desktop.ini", "ehthumbs.db"))
SPLIT_NAMES = {
    "train": "train", "training": "train", "val": "val", "valid": "val", "validation": "val", "dev": "val",
    "test": "test", "testing": "test",
}  # fmt: skip
"""Names of splits in folders and files, and the names by which they are selected."""
ALL_CLASSES = "classes"
"""PATH#classes reads the sub-folders as classes and leaves out the images beside them."""
PARTS = (*dict.fromkeys(SPLIT_NAMES.values()), ALL_CLASSES)


class FileTree(NamedTuple):
    """Files of a folder or an archive.

    Attributes:
        uri: Setting data.source, for messages.
        names: Paths of the files relative to it, with "/", sorted by their parts; without hidden and system files.
        folders: Paths of the sub-folders, sorted.
        read: Function of a name and a number of bytes, -1 for all, that returns the begin of a file.
        notes: Notes on what is not listed.
        is_archive: True if a single folder at the top is the one that was packed, and no class.
    """

    uri: str
    names: Sequence[str]
    folders: Sequence[str]
    read: Callable[[str, int], bytes]
    notes: Sequence[str] = ()
    is_archive: bool = False


class Layout(NamedTuple):
    """Images of a tree.

    Attributes:
        names: Files of the N images; a metadata file may name one several times.
        labels: Classes (N,) int64.
        class_names: Names of the classes; empty without classes.
        captions: N captions of a metadata file; None if there is none.
        caption_files: File with the caption of each image, "" for none.
        folder_classes: True if folders are the classes: their names are the captions of images without one.
        has_latents: True if the files are latents.
        held_out: Splits that are not read, validation first.
        notes: Notes on what was read and what was not.
    """

    names: list[str]
    labels: np.ndarray
    class_names: tuple[str, ...]
    captions: list[str] | None
    caption_files: list[str]
    folder_classes: bool
    has_latents: bool
    held_out: tuple[str, ...]
    notes: list[str]


class _Files(NamedTuple):
    """Names of a tree by what the files are."""

    images: list[str]
    latents: list[str]
    heif: list[str]


class _Split(NamedTuple):
    """Folder that is read, folder from which classes are numbered, splits that are held out, and notes on them."""

    root: str
    classes_root: str
    held_out: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


class _Labels(NamedTuple):
    """Images with their classes, their captions if a file has them, and the files that this was read from."""

    names: list[str]
    labels: np.ndarray
    class_names: tuple[str, ...]
    notes: list[str]
    captions: list[str] | None = None
    folder_classes: bool = False
    used: tuple[str, ...] = ()


def is_hidden(part: str) -> bool:
    """Return whether a file or folder of this name is hidden or made by an operating system."""
    return (part.startswith(".") and part not in (".", "..")) or part in SYSTEM_NAMES or part in SYSTEM_FILES


def hidden_notes(uri: str, hidden: Sequence[str]) -> list[str]:
    """Return notes on hidden and system folders (names that end in "/") and hidden images that are not read."""
    folders = [name for name in hidden if name.endswith("/")]
    images = [name for name in hidden if name.lower().endswith(IMAGE_SUFFIXES)]
    notes = []
    if folders:
        notes.append(f"{len(folders)} hidden or system folders in {uri} are not read: {format_names(folders)}")
    if images:
        notes.append(f"{len(images)} hidden files in {uri} are not read: {format_names(images)}")
    return notes


def split_name(part: str) -> str | None:
    """Return the split that a folder or file is of, such as val for Validation/ or validation-00000.parquet."""
    stem = part.lower()
    for separator in "-_.":
        stem = stem.partition(separator)[0]
    return SPLIT_NAMES.get(stem)


def parts_key(name: str) -> list[str]:
    """Return the key that sorts paths by their parts: "a/z" comes before "a b/c"."""
    return name.split("/")


def find_layout(tree: FileTree, part: str | None = None) -> Layout:
    """Return the images of a tree, with classes and captions.

    Args:
        tree: Files.
        part: One of PARTS, from PATH#PART; None chooses by the layout.

    Raises:
        UsageError: There are no images; or metadata contradict the files; or the part is not there.
    """
    files = _sort_out(tree)
    if files.images and files.latents:
        raise UsageError(
            f"data.source={tree.uri}: {len(files.images)} images and {len(files.latents)} latents in one "
            f"{'zip' if tree.is_archive else 'folder'}; make it two"
        )
    everything = files.images or files.latents
    split = _choose_split(tree, everything, part)
    labels = _find_labels(tree, everything, split, part, set(files.heif))
    caption_files = _caption_files(tree, labels.names) if labels.captions is None else [""] * len(labels.names)
    used = {*everything, *files.heif, *labels.used, *_all_caption_files(tree, everything)}
    notes = [*split.notes, *labels.notes, *_heif_notes(tree.uri, files.heif), *tree.notes]
    notes += unread_notes(tree.uri, [name for name in tree.names if name not in used])
    return Layout(
        labels.names, labels.labels, labels.class_names, labels.captions, caption_files, labels.folder_classes,
        bool(files.latents), split.held_out, notes,
    )  # fmt: skip


def _sort_out(tree: FileTree) -> _Files:
    """Return the images, the latents, and the HEIC images that cannot be read here, by suffix or by content."""
    images, latents, heif = list[str](), list[str](), list[str]()
    for name in tree.names:
        lower = name.lower()
        if lower.endswith(IMAGE_SUFFIXES):
            images.append(name)
        elif is_latents(name):
            latents.append(name)
        elif not lower.endswith(KNOWN_SUFFIXES):
            kind = decode.image_format(_head(tree, name))
            if kind == "HEIF" and not decode.has_heif():
                heif.append(name)
            elif kind in decode.SIGNATURE_FORMATS or lower.endswith(HEIF_SUFFIXES):
                images.append(name)  # a damaged .heic is an unreadable image
    return _Files(images, latents, heif)


def _head(tree: FileTree, name: str) -> bytes:
    try:
        return tree.read(name, decode.HEAD_BYTES)
    except Exception:  # unreadable, or damaged in an archive: no image
        return b""


def _read_file(tree: FileTree, name: str) -> bytes:
    max_bytes = untrusted.MAX_TEXT_BYTES if name.endswith("dataset.json") else untrusted.MAX_ITEM_BYTES
    try:
        content = tree.read(name, max_bytes + 1)
    except OSError as error:
        reason = error.strerror or str(error)
        raise UsageError(f"data.source={tree.uri}: {format_names([name])} cannot be read ({reason})") from None
    if len(content) > max_bytes:
        raise UsageError(f"data.source={tree.uri}: {format_names([name])} has more than {max_bytes / 2**20:g} MiB")
    return content


def is_latents(name: str) -> bool:
    """Return whether a file is named like the latents of EDM2's dataset_tool.py."""
    return name.rpartition("/")[2].startswith("img-mean-std-") and name.endswith(".npy")


def _heif_notes(uri: str, names: Sequence[str]) -> list[str]:
    if not names:
        return []
    return [
        f"{len(names)} HEIC images in {uri} are not read: {format_names(names)}; {install_command('heif')}, or "
        "convert them to JPEG"
    ]


def unread_notes(uri: str, names: Sequence[str]) -> list[str]:
    """Return a note on other files, counted by suffix."""
    if not names:
        return []
    counts = Counter(os.path.splitext(name)[1].lower() or "without suffix" for name in names)
    kinds = [f"{count} {suffix}" for suffix, count in counts.most_common()]
    return [f"{len(names)} other files in {uri} are not read ({format_names(kinds, 5)}), such as {names[0]!r}"]


# Splits.


def _choose_split(tree: FileTree, images: Sequence[str], part: str | None) -> _Split:
    """Return the split to read: the wanted one, or train if there are splits, or else everything."""
    base = _base_folder(tree, images)
    tops = Counter(top_folder(name, base) for name in images if name.startswith(base))
    loose = tops.pop("", 0)
    splits: dict[str, list[str]] = {}
    for top in tops:
        if top.lower() in SPLIT_NAMES:
            splits.setdefault(SPLIT_NAMES[top.lower()], []).append(top)
    others = [top for top in tops if top.lower() not in SPLIT_NAMES]
    is_unique = all(len(names) == 1 for names in splits.values())  # not both val and validation
    has_splits = "train" in splits and is_unique and (len(splits) > 1 or not (others or loose))
    wanted = "train" if part in (None, ALL_CLASSES) else str(part)
    if not has_splits and part in (None, ALL_CLASSES):
        root = base if tree.is_archive else ""
        return _Split(root, root)
    if not has_splits or wanted not in splits:
        raise UsageError(f"data.source={tree.uri}: {missing_split(wanted, splits if has_splits else ())}")
    path = tree.uri.rpartition("#")[0] if part else tree.uri
    held_out = tuple(f"{path}#{split}" for split in ("val", "test") if split in splits) if part != wanted else ()
    counts = {split: tops[names[0]] for split, names in splits.items()}
    notes = [] if part == wanted else [split_note(path, counts, held_out)]
    unread = [f"{base}{top}/" for top in others] + [base or "its top folder"] * bool(loose)
    if unread:
        notes.append(f"images of {tree.uri} that belong to no split are not read: those in {format_names(unread)}")
    return _Split(f"{base}{splits[wanted][0]}/", f"{base}{splits['train'][0]}/", held_out, tuple(notes))


def missing_split(wanted: str, splits: Iterable[str]) -> str:
    """Return the error of a split that is not there."""
    known = format_names(list(splits), 5)
    return f"there is no split {wanted}; " + (f"there are {known}" if known else "sub-folders and files are no splits")


def split_note(path: str, counts: Mapping[str, int], held_out: Sequence[str], what: str = "images") -> str:
    """Return a note on the splits of a source, of which train is read."""
    note = f"{path} has splits: train is read ({counts['train']:,} {what})"
    if not held_out:
        return note
    held = " and ".join(f"{split} ({counts[split]:,})" for split in counts if split != "train")
    setting = quoted(f"monitor.validation_source={held_out[0]}")
    return (
        f"{note}; {held} {'is' if len(held_out) == 1 else 'are'} held out. For a validation loss on "
        f"{held_out[0].rpartition('#')[2]}, set {setting}, or data.num_validation to a number of its images"
    )


def quoted(text: str) -> str:
    """Return text as a word of a shell, quoted only if that is necessary."""
    return text if re.fullmatch(r"[\w@%+=:,./#-]+", text) else shlex.quote(text)


def _base_folder(tree: FileTree, images: Sequence[str]) -> str:
    """Return the folder, with "/", in which classes or splits lie: the top, or a single folder in it that holds all.

    In an archive that is the folder that was packed; in a folder a single sub-folder is a class unless it has splits.
    """
    tops = {name.partition("/")[0] if "/" in name else "" for name in images}
    if len(tops) != 1 or "" in tops:
        return ""
    (top,) = tops
    inside = {SPLIT_NAMES.get(name.split("/")[1].lower()) for name in images if name.count("/") > 1}
    has_splits = "train" in inside and None not in inside and len(inside) > 1
    return f"{top}/" if tree.is_archive or has_splits else ""


# Classes and captions.


def _find_labels(tree: FileTree, everything: list[str], split: _Split, part: str | None, heif: set[str]) -> _Labels:
    """Return the images of a split with the labels of a metadata file, of dataset.json, or of folders."""
    images, there = [name for name in everything if name.startswith(split.root)], set(tree.names)
    metadata = None if part == ALL_CLASSES else _find_metadata(tree, split.root)
    folder = next((f for f in _parents(split.root) if f"{f}dataset.json" in there), None)
    labels = None
    if metadata is not None:
        labels = _labels_from_metadata(tree, images, metadata, split.root, heif)
    elif folder is not None and images:
        labels = _labels_from_dataset_json(tree, images, folder)
    if labels is None:
        classes_from = [
            top_folder(name, split.classes_root) for name in everything if name.startswith(split.classes_root)
        ]
        labels = _labels_from_folders(tree, images, split.root, sorted({*classes_from} - {""}), part)
    if not labels.names:
        raise no_images_error(tree, heif)
    return labels


def no_images_error(tree: FileTree, heif: set[str]) -> UsageError:
    """Return the error of a tree without images; it names what is there instead."""
    what = f"no images {'in the zip' if tree.is_archive else 'there'} ({', '.join(IMAGE_SUFFIXES)})"
    cures = _heif_notes(tree.uri, sorted(heif)) + unread_notes(tree.uri, [n for n in tree.names if n not in heif])
    arrays = [name for name in tree.names if name.endswith((".npy", ".npz", ".safetensors", ".pt"))]
    if arrays:
        cures.append(
            "latents are read as EDM2 writes them: img-mean-std-*.npy with float32 (2C, h, w), mean and standard "
            "deviation, in a folder or a zip; write others from their images with gesso cache --vae"
        )
    elif tree.is_archive:
        what += ", and no img-mean-std-*.npy"
    if not tree.folders:
        what += "" if tree.is_archive else ", and no sub-folders"
    elif not tree.names:
        what += f"; its sub-folders are empty: {format_names(tree.folders, 5)}"
    return UsageError("; ".join([f"data.source={tree.uri}: {what}", *cures, *tree.notes]))


def _parents(root: str) -> list[str]:
    """Return a folder and all above it, deepest first, such as ["a/b/", "a/", ""]."""
    parts = root.split("/")[:-1]
    return ["".join(f"{part}/" for part in parts[:n]) for n in range(len(parts), -1, -1)]


def _find_metadata(tree: FileTree, root: str) -> list[str] | None:
    """Return the metadata files that describe a folder: one in it or above it, else those of its sub-folders."""
    by_folder = dict[str, list[str]]()
    for name in tree.names:
        folder, _, file = name.rpartition("/")
        if file in METADATA_FILES:
            by_folder.setdefault(f"{folder}/" if folder else "", []).append(file)
    chosen = {folder: folder + min(files, key=METADATA_FILES.index) for folder, files in by_folder.items()}
    for folder in _parents(root):
        if folder in chosen:
            return [chosen[folder]]
    return [file for folder, file in chosen.items() if folder.startswith(root)] or None


def _labels_from_metadata(
    tree: FileTree, images: Sequence[str], files: Sequence[str], root: str, heif: set[str]
) -> _Labels:
    """Return the images that metadata files name, in their order; a line is a sample."""
    known = set(tree.names)
    names, texts, values, missing = list[str](), list[str | None](), list[int | str | None](), list[str]()
    total, not_utf8, has_labels, num_heif = 0, 0, False, 0
    for file in files:
        folder = file.rpartition("/")[0]
        path = f"{tree.uri}/{file}" if tree.is_archive else os.path.join(tree.uri, file)
        metadata = read_metadata(path, _read_file(tree, file))
        not_utf8 += metadata.not_utf8
        for row in metadata.rows:
            name = os.path.normpath(os.path.join(folder, row.file))
            total += 1
            if name not in known:
                missing.append(os.path.normpath(row.file))
            elif name in heif:
                num_heif += 1
            elif name.startswith(root):
                names.append(name)
                texts.append(row.text)
                values.append(row.label)
                has_labels |= row.label is not None
    described = format_names(files)
    if missing:
        raise UsageError(
            f"data.source={tree.uri}: {len(missing)} of the {total} images that {described} names are not there: "
            f"{format_names(missing)}"
        )
    if not names and not num_heif:
        raise UsageError(f"data.source={tree.uri}: {described} names no image" + f" in {root}" * bool(root))
    labels, class_names, notes = np.zeros(len(names), np.int64), tuple[str, ...](), list[str]()
    if has_labels:
        labels, class_names, notes = metadata_labels(tree.uri, values, names.__getitem__)
    captions = [
        (class_names[label] if class_names and text is None else text) or ""
        for text, label in zip(texts, labels, strict=True)
    ]
    num_empty = sum(not text for text in captions)
    notes = caption_notes(tree.uri, len(names), num_empty, not_utf8) + notes
    left = len(images) - len(set(names) & set(images))
    if left:
        notes.append(f"{left} images in {tree.uri} are left out: {described} does not name them")
    return _Labels(names, labels, class_names, notes, captions, used=tuple(files))


def _labels_from_dataset_json(tree: FileTree, images: list[str], folder: str) -> _Labels | None:
    """Return the images with the labels of EDM2's dataset.json; None if a folder has another file of that name."""
    file = f"{folder}dataset.json"
    try:
        pairs = parse_dataset_json(_read_file(tree, file))
    except ValueError:
        if not tree.is_archive:
            return None
        raise UsageError(
            f'data.source={tree.uri}: its dataset.json is not {{"labels": [[name, class], ...]}} or {{"labels": null}}'
        ) from None
    if pairs is None:
        note = f"{tree.uri} has no labels: training without classes"
        return _Labels(images, np.zeros(len(images), np.int64), (), [note], used=(file,))
    given = {folder + name: label for name, label in pairs}
    if len(given) < len(pairs):
        raise UsageError(f"data.source={tree.uri}: dataset.json names {len(pairs) - len(given)} files twice")
    there = set(tree.names)
    unknown = [name[len(folder) :] for name in given if name not in there]
    without = [name for name in images if name not in given]
    for wrong, what in ((unknown, "labels files that are not there"), (without, "has no label for")):
        if wrong:
            raise UsageError(f"data.source={tree.uri}: dataset.json {what}: {format_names(wrong)}")
    labels = validate_labels(tree.uri, [given[name] for name in images], images.__getitem__)
    return _Labels(images, labels, numbered_class_names(labels), [], used=(file,))


def _labels_from_folders(
    tree: FileTree, images: list[str], root: str, known_classes: list[str], part: str | None
) -> _Labels:
    """Return the images with sub-folders as classes, or without classes if images lie beside them.

    Classes are numbered as `known_classes`, those of the training split, if it has all of them.
    """
    tops = [top_folder(name, root) for name in images]
    classes, loose = sorted({*tops} - {""}), sum(not top for top in tops)
    no_labels = np.zeros(len(images), np.int64)
    if not classes:
        return _Labels(images, no_labels, (), [f"{tree.uri} has no sub-folders: training without classes"])
    path = tree.uri if part is None else tree.uri.rpartition("#")[0]
    if loose and part != ALL_CLASSES:
        setting = quoted(f"data.source={path}#{ALL_CLASSES}")
        note = (
            f"{loose} images of {tree.uri} lie beside its sub-folders ({format_names(classes)}): all {len(images)} are "
            f"read, without classes. {setting} reads the sub-folders alone, as classes"
        )
        return _Labels(images, no_labels, (), [note])
    classes = known_classes if set(known_classes).issuperset(classes) else classes
    index = {name: i for i, name in enumerate(classes)}
    chosen = [i for i, top in enumerate(tops) if top]
    notes = [f"{loose} images beside the class folders of {tree.uri} are left out"] if loose else []
    depth = root.count("/")
    below = [folder[len(root) :] for folder in tree.folders if folder.startswith(root) and folder.count("/") == depth]
    empty = [folder for folder in below if folder not in index]
    if empty:
        notes.append(f"{len(empty)} sub-folders of {tree.uri} without images are no classes: {format_names(empty, 5)}")
    labels = np.array([index[tops[i]] for i in chosen], np.int64)
    return _Labels([images[i] for i in chosen], labels, tuple(classes), notes, folder_classes=True)


def top_folder(name: str, root: str) -> str:
    """Return the folder in `root` that a file lies in, "" if it lies in `root` itself."""
    folder, slash, _ = name[len(root) :].partition("/")
    return folder if slash else ""


def _caption_files(tree: FileTree, images: Sequence[str]) -> list[str]:
    """Return the caption file of each image, "" for none."""
    there = {name for name in tree.names if name.endswith(CAPTION_SUFFIXES)}
    if not there:
        return [""] * len(images)
    stems = (os.path.splitext(name)[0] for name in images)
    return [next((stem + suffix for suffix in CAPTION_SUFFIXES if stem + suffix in there), "") for stem in stems]


def _all_caption_files(tree: FileTree, images: Sequence[str]) -> set[str]:
    """Return all files that may describe an image of the tree, of any split."""
    captions = [name for name in tree.names if name.endswith(CAPTION_SUFFIXES)]
    stems = {os.path.splitext(name)[0] for name in images} if captions else set()
    return {name for name in captions if os.path.splitext(name)[0] in stems}
