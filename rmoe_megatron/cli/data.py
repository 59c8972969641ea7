"""The command line of data: ``rmoe data build-shapes / build-mazes / pack / check / index / precompute / show``."""

import os
from pathlib import Path
from typing import Annotated

import typer

from rmoe_megatron.cli.options import Bar, Overrides, keeping, parse_numbers, parse_part
from rmoe_megatron.distributed import launch
from rmoe_megatron.errors import UserError
from rmoe_megatron.files import atomic

Processes = Annotated[
    int | None,
    typer.Option(
        min=1,
        max=1024,
        help="Let so many processes look at samples at the same time. The default is all cores.",
        show_default=False,
    ),
]

NAMED = 20  # files that a command names, of those that it leaves out

data_app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode=None,
    help="Build and prepare data.",
    epilog="Example: rmoe data pack my_pictures data/mine",
)


@data_app.command(
    "build-shapes", epilog="Example: rmoe data build-shapes data/shapes --train 20000 --val 1000"
)
def build_shapes_command(
    out: Annotated[Path, typer.Argument(help="Name the folder to create.")],
    train: Annotated[int, typer.Option(min=1, max=10_000_000, help="Write so many training images.")] = 20000,
    val: Annotated[int, typer.Option(min=1, max=1_000_000, help="Write so many validation prompts.")] = 1000,
    seed: Annotated[int, typer.Option(min=0, max=(1 << 32) - 1, help="Draw the scenes from this seed.")] = 0,
) -> None:
    """Write the toy shapes set as WebDataset shards."""
    launch.require_one_rank("rmoe data build-shapes")
    atomic.require_empty(out, "The output")  # before what is slow to import
    from rmoe_megatron.data.shapes.build import build_shapes

    build_shapes(out, train, val, seed, progress=Bar("shapes", "image"))


@data_app.command("build-mazes", epilog="Example: rmoe data build-mazes data/mazes --task region")
def build_mazes_command(
    out: Annotated[Path, typer.Argument(help="Name the folder to create.")],
    task: Annotated[
        str,
        typer.Option(
            help="Ask for the path from mark to mark in a maze (path), or for the region that a mark reaches (region)."
        ),
    ] = "region",
    canvas: Annotated[int, typer.Option(min=2, max=64, help="Make pictures of so many cells a side.")] = 8,
    train_sides: Annotated[str, typer.Option(help="Train on squares of these sides.")] = "5,6",
    train_steps: Annotated[
        int, typer.Option(min=1, max=4096, help="Train on searches of at most so many steps.")
    ] = 8,
    test_sides: Annotated[str, typer.Option(help="Test on squares of these sides.")] = "6,7,8",
    test_steps: Annotated[
        str, typer.Option(help="Test on ranges of steps that end at these numbers.")
    ] = "4,8,12,16,20",
    train: Annotated[int, typer.Option(min=1, max=10_000_000, help="Write so many training grids.")] = 40000,
    val: Annotated[int, typer.Option(min=0, max=1_000_000, help="Write so many validation grids.")] = 512,
    test: Annotated[
        int, typer.Option(min=0, max=1_000_000, help="Write so many test grids, of all ranges together.")
    ] = 1000,
    seed: Annotated[int, typer.Option(min=0, max=(1 << 32) - 1, help="Draw the grids from this seed.")] = 0,
) -> None:
    """Write mazes as WebDataset shards, with the text encoder that reads them."""
    launch.require_one_rank("rmoe data build-mazes")
    atomic.require_empty(out, "The output")  # before what is slow to import
    from rmoe_megatron.data.mazes.build import MazeSettings, build_mazes
    from rmoe_megatron.data.mazes.sample import Task

    if task not in list(Task):
        raise UserError(f"--task {task} must be {' or '.join(Task)}.")
    settings = MazeSettings(
        Task(task),
        canvas,
        parse_numbers("--train-sides", train_sides),
        train_steps,
        parse_numbers("--test-sides", test_sides),
        parse_numbers("--test-steps", test_steps),
    )
    build_mazes(out, settings, {"train": train, "val": val, "test": test}, seed, Bar("mazes", "grid"))


@data_app.command("pack", epilog="Example: rmoe data pack my_pictures data/mine")
@keeping("the shards that are finished")
def pack_command(
    source: Annotated[
        Path,
        typer.Argument(
            help="Name a folder of pictures, a table (CSV, TSV, JSONL, Parquet, Arrow), a saved Hugging Face data set, or a folder of shards."
        ),
    ],
    out: Annotated[Path, typer.Argument(help="Name the folder to create.")],
    image_column: Annotated[
        str | None,
        typer.Option(
            help="Take a table's pictures, as paths or bytes, from this column. The default is image, or one that is usually called so."
        ),
    ] = None,
    caption_column: Annotated[
        str | None,
        typer.Option(
            help="Take a table's captions from this column. The default is caption, or one that is usually called so."
        ),
    ] = None,
    samples_per_shard: Annotated[
        int, typer.Option(min=1, max=1_000_000, help="Write so many samples into every shard but the last.")
    ] = 10_000,
    split: Annotated[
        str | None,
        typer.Option(
            help="Take this split (train) of a source that has several. With all it takes them together."
        ),
    ] = None,
) -> None:
    """Write your own pictures and captions as WebDataset shards."""
    launch.require_one_rank("rmoe data pack")
    if not source.exists():
        raise UserError(f"There is no folder or table {source}; check the path.")
    atomic.require_empty(out, "The output")  # before what is slow to import
    from rmoe_megatron.data.packing.pack import BESIDE, LEFT_OUT, pack
    from rmoe_megatron.data.packing.rows import Columns

    columns = Columns(image_column, caption_column)
    packed = pack(source, out, columns, samples_per_shard, Bar("pack", "picture"), split)
    print(f"{packed.samples} samples in {packed.shards} shards: {out}")
    _name("left out", [f"{name}: {reason}" for name, reason in packed.left_out], out / LEFT_OUT)
    for column, kind in packed.dropped_columns.items():
        print(f"values of the column {column} are dropped: JSON holds no {kind}")
    for column, count in packed.with_several_captions.items():
        print(
            f"{count} samples have several captions; data.captions=[json:{column}] draws one of them, the default takes the first"
        )
    for note in packed.notes:
        print(note)
    _name("not taken, beside the pictures", packed.beside, out / BESIDE)


def _name(what: str, files: list[str], listed: Path) -> None:
    """Print the names of files that were not packed, as many as a reader looks at, and where all are."""
    if files:
        print(f"{len(files)} {what}, all named in {listed}:")
        print("\n".join(f"  {each}" for each in files[:NAMED]))
    if len(files) > NAMED:
        print(f"  and {len(files) - NAMED} more")


@data_app.command("check", epilog="Example: rmoe data check data/mine report")
def check_command(
    folder: Annotated[Path, typer.Argument(help="Name a folder of raw .tar shards.")],
    out: Annotated[
        Path, typer.Argument(help="Name the folder to create, for a table, histograms and a contact sheet.")
    ],
    captions: Annotated[
        list[str] | None,
        typer.Option(
            "--caption",
            help="Take captions from txt (the default), caption or json:KEY. The option can be given several times.",
        ),
    ] = None,
    processes: Processes = None,
) -> None:
    """Decode every sample and say what there is: sizes, captions, damage, duplicates."""
    launch.require_one_rank("rmoe data check")
    atomic.require_empty(out, "The output")
    _require_shards(str(folder))
    from rmoe_megatron.config.captions import parse_captions
    from rmoe_megatron.data.report import inspect_shards, lines, write_report
    from rmoe_megatron.data.training_dataset import SampleFormat

    sample_format = SampleFormat(captions=parse_captions(captions or ["txt"]))
    report = inspect_shards(folder, sample_format, Bar("check", "sample"), processes or _cores())
    write_report(report, out)
    print("\n".join(lines(report)))
    print(f"{'pictures':<15}{out}")


@data_app.command("index", epilog="Example: rmoe data index data/mine --processes 4")
def index_command(
    folder: Annotated[str, typer.Argument(help="Name a folder of .tar shards, or the URL of one.")],
    processes: Annotated[
        int, typer.Option(min=1, max=256, help="Let so many processes scan shards at the same time.")
    ] = 1,
    sample_filter: Annotated[
        str | None,
        typer.Option(
            "--filter",
            help="Index the samples that this data.filter of a run lets through. They have an index of their own.",
        ),
    ] = None,
) -> None:
    """Find the samples of all shards, once. Shards that haven't changed since the last time are not read again."""
    launch.require_one_rank("rmoe data index")
    _require_shards(folder)
    from rmoe_megatron.config.sample_filter import SampleFilter
    from rmoe_megatron.data.shards.build_index import build_index, index_name
    from rmoe_megatron.data.storage.remote_store import shard_store

    parsed = SampleFilter(sample_filter) if sample_filter is not None else None
    store = shard_store(folder)
    index = build_index(store, parsed, processes, Bar("index", "shard"))
    for kind in sorted(index.kinds, key=lambda kind: -kind.samples):
        if kind.samples:
            print(f"{kind.samples:>12} samples with {', '.join(kind.members)}")
    print(f"{len(index):>12} samples in {len(index.shards)} shards")
    paths = store.index_paths(index_name(parsed))
    print(f"index {next((path for path in paths if path.is_file()), 'not written')}")


@data_app.command(
    "precompute",
    epilog="Example: rmoe data precompute configs/shapes_tiny.yaml data/shapes data/shapes_encoded",
)
@keeping("the shards that are finished")
def precompute_command(
    config: Annotated[Path, typer.Argument(help="Name the configuration whose encoders are used.")],
    source: Annotated[Path, typer.Argument(help="Name a folder with raw shards, possibly in subfolders.")],
    out: Annotated[Path, typer.Argument(help="Name the folder to create.")],
    overrides: Overrides = None,
    part: Annotated[
        str, typer.Option(help="Be the K-th (from 0) of N processes or jobs that fill OUT together, as K/N.")
    ] = "0/1",
    check: Annotated[
        bool, typer.Option("--check", help="Check what is asked for, and encode nothing.")
    ] = False,
) -> None:
    """Encode raw shards once into latents and text embeddings. With torchrun or srun each rank encodes its part."""
    from rmoe_megatron.config.loading import load_config

    loaded = load_config(config, overrides or [])
    if not source.is_dir():
        raise UserError(f"There is no folder {source}; name one with raw .tar shards in or below it.")
    from rmoe_megatron.precompute.job import check_precompute, precompute

    if check:
        check_precompute(loaded, source, out)
        return
    is_finished = precompute(loaded, source, out, parse_part(part), Bar("precompute", "shard"))
    if launch.is_main_process():
        print(
            f"{out} is complete"
            if is_finished
            else f"part {part} is done; {out} appears when the last part is"
        )


@data_app.command("show", epilog="Example: rmoe data show data/mine --config configs/shapes_tiny.yaml")
def show_command(
    place: Annotated[
        Path, typer.Argument(metavar="PLACE", help="Name a folder of raw .tar shards, or of a training run.")
    ],
    draw: Annotated[
        int | None,
        typer.Option(
            min=0,
            max=1 << 40,
            help="Show the draw of this number of a run, as logs name it.",
            show_default=False,
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            help="Write the page (HTML), or the picture of a draw (PNG), to this file. The default is PLACE.html, or a file below PLACE/draws.",
            show_default=False,
        ),
    ] = None,
    config: Annotated[
        Path | None,
        typer.Option(
            help="Hold the shards against the captions, filter, sizes and tokens of this configuration.",
            show_default=False,
        ),
    ] = None,
    overrides: Overrides = None,
    processes: Processes = None,
) -> None:
    """Write a page to look at shards: samples, sizes, captions, duplicates, what is left out. Or find a draw of a run."""
    launch.require_one_rank("rmoe data show")
    if draw is None:
        _show_shards(
            place, out or place.with_name(f"{place.resolve().name}.html"), config, overrides or [], processes
        )
        return
    from rmoe_megatron.inspection.draw import show_draw

    found = show_draw(place, draw, overrides or [], out)
    print(f"shard    {found.shard}\nkey      {found.key}")
    if found.caption is not None:
        print(f"caption  {found.caption}")
    if found.class_label is not None:
        print(f"class    {found.class_label}")
    if not found.is_finite:
        print("latents  not finite, black in the picture")
    print(f"picture  {found.picture}")


def _show_shards(
    folder: Path, out: Path, config: Path | None, overrides: list[str], processes: int | None
) -> None:
    if (folder / "config.yaml").is_file():
        raise UserError(f"{folder} is a run: name one of its draws with --draw, or the folder of its shards.")
    _require_shards(str(folder))
    from rmoe_megatron.config.loading import load_config
    from rmoe_megatron.data.page import SHOWN, write_page
    from rmoe_megatron.data.report import inspect_shards
    from rmoe_megatron.data.training_dataset import SampleFormat
    from rmoe_megatron.encoders.token_counts import token_counter
    from rmoe_megatron.input_pipeline.settings import sample_format

    if config is None and overrides:
        raise UserError("Settings override those of a configuration; name it with --config.")
    atomic.check_writable(out.parent, "The folder of the page")
    taken, counter = SampleFormat(), None
    if config is not None:
        loaded = load_config(config, overrides)
        taken = sample_format(loaded)
        if loaded.model.is_class_conditional:
            raise UserError("A class-conditional model has no captions to look at; leave --config out.")
        counter = token_counter(loaded.encoders, loaded.model.text_length)
    report = inspect_shards(folder, taken, Bar("show", "sample"), processes or _cores(), SHOWN, counter)
    write_page(report, out, folder, taken, counter.limit if counter is not None else None)
    print(f"page     {out}")


def _require_shards(location: str) -> None:
    """Refuse a folder of this machine without shards before what is slow is imported; a URL is asked once, by what reads it."""
    from rmoe_megatron.data.storage.remote_store import shard_store
    from rmoe_megatron.data.storage.store import LocalStore

    if isinstance(store := shard_store(location), LocalStore):
        store.shards()


def _cores() -> int:
    """Return how many cores this process may use."""
    return len(os.sched_getaffinity(0))
