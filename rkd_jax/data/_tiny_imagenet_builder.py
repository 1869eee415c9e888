"""TFDS builder of Tiny-ImageNet-200 (Stanford CS231n, 2015): 100,000 + 10,000 images of 64x64, 200 classes of ImageNet.

It reads the official archive, or one of the same layout with fewer images a class. Classes are numbered in the order of
their sorted WordNet ids, as PyTorch's ImageFolder numbers them. The test images have no labels and are left out.
"""

import io
import zipfile
import zlib
from collections.abc import Iterator
from typing import Any

import tensorflow_datasets as tfds
from PIL import Image


class TinyImagenet(tfds.core.GeneratorBasedBuilder):
    """Tiny-ImageNet-200; `archive`, if set before preparing, is the archive to read instead of downloading it."""

    VERSION = tfds.core.Version("1.0.0")
    URL = "http://cs231n.stanford.edu/tiny-imagenet-200.zip"
    ARCHIVES = ("tiny-imagenet-200.zip", "tiny-imagenet-200*.zip")  # names under which it may be placed by hand
    archive = ""

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            description="Tiny-ImageNet-200, for training and validation.",
            homepage="http://cs231n.stanford.edu/",
            features=tfds.features.FeaturesDict(
                {
                    "image": tfds.features.Image(shape=(64, 64, 3)),
                    "label": tfds.features.ClassLabel(num_classes=200),
                    "file_name": tfds.features.Text(),
                }
            ),
            supervised_keys=("image", "label"),
        )

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Iterator]:
        path = self.archive or dl_manager.download(self.URL)
        try:
            archive = zipfile.ZipFile(path)
        except zipfile.BadZipFile as error:
            raise ValueError(f"{path} is no complete zip archive ({error}); fetch {self.URL} again") from error
        names = archive.namelist()
        top = next((name.removesuffix("wnids.txt") for name in names if name.endswith("wnids.txt")), None)
        if top is None or f"{top}val/val_annotations.txt" not in names:
            raise ValueError(f"{path} lacks wnids.txt or val/val_annotations.txt: it is not {self.URL}")
        self.info.features["label"].names = sorted(self._read(archive, f"{top}wnids.txt").decode().split())
        annotations = self._read(archive, f"{top}val/val_annotations.txt").decode().splitlines()
        validation = {
            f"{top}val/images/{file_name}": wnid
            for file_name, wnid, *_ in (line.split("\t") for line in annotations if line)
        }
        train = {
            name: name.removeprefix(f"{top}train/").partition("/")[0]
            for name in names
            if name.startswith(f"{top}train/") and name.endswith(".JPEG")
        }
        return {
            "train": self._generate_examples(archive, train),
            "validation": self._generate_examples(archive, validation),
        }

    def _generate_examples(
        self, archive: zipfile.ZipFile, labels: dict[str, str]
    ) -> Iterator[tuple[str, dict[str, Any]]]:
        for name, wnid in labels.items():
            file_name = name.rpartition("/")[2]
            yield file_name, {"image": to_rgb(self._read(archive, name)), "label": wnid, "file_name": file_name}

    def _read(self, archive: zipfile.ZipFile, name: str) -> bytes:
        try:
            return archive.read(name)
        except (zipfile.BadZipFile, KeyError, zlib.error) as error:
            path = archive.filename
            raise ValueError(f"{path}: {name} is damaged or missing ({error}); fetch {self.URL} again") from error


def to_rgb(encoded: bytes) -> io.BytesIO:
    """The file of an RGB image as it is, of any other as a PNG in RGB."""
    file = io.BytesIO(encoded)
    image = Image.open(file)
    if image.mode != "RGB":
        file = io.BytesIO()
        image.convert("RGB").save(file, "png")
    file.seek(0)
    return file
