"""Prepares a data set ahead of the first run: `python -m rkd_jax.data tiny_imagenet --data_dir DIR --archive X.zip`."""

import argparse
from pathlib import Path

from rkd_jax import _flags, data
from rkd_jax.data import _prepared


def main(argv: list[str] | None = None) -> None:
    """Downloads or takes the archive, prepares, decodes into the cache, and says what is there."""
    parser = argparse.ArgumentParser(prog="python -m rkd_jax.data", description=main.__doc__)
    parser.add_argument("name", metavar="NAME", help=f"{', '.join(data.names())}, tfds:NAME, or folder:PATH")
    parser.add_argument("--data_dir", default="", help=_flags.DATA_DIR_HELP)
    parser.add_argument("--archive", default="", help="tiny_imagenet: an archive at hand, instead of a download")
    parser.add_argument("--cache", type=Path, help="copy the decoded set here: a data_dir that needs no TFDS")
    arguments = parser.parse_args(argv)
    with _flags.one_sentence(arguments, dataset="NAME"):
        root = _prepared.folder(arguments.data_dir)
        if arguments.archive and not _prepared.builder_module(arguments.name):
            raise ValueError(f"--archive is for tiny_imagenet; {arguments.name} has no use for it")
        if arguments.archive and not Path(arguments.archive).expanduser().is_file():
            raise FileNotFoundError(f"--archive={arguments.archive} is no file")
        if arguments.archive:
            _prepared.prepare(arguments.name, root, archive=str(Path(arguments.archive).expanduser()))
        splits = data.load(arguments.name, arguments.data_dir)
        if arguments.cache:
            name = arguments.name.removeprefix("tfds:")
            if not (root / name.partition(":")[0]).is_dir():
                raise ValueError(f"--cache is of what TFDS prepared, and {arguments.name} needs none; leave it out")
            print(f"copied to {_prepared.copy_cache(name, arguments.data_dir, arguments.cache)}")
    for name, split in (("train", splits.train), ("test", splits.test)):
        shape = "x".join(map(str, split.images.shape[1:]))
        print(f"{arguments.name} {name}: {len(split.labels)} images of {shape}, {splits.num_classes} classes")


if __name__ == "__main__":
    main()
