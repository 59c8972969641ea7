"""The command line of data: ``rmoe data build-shapes / build-mazes / pack / check / index / precompute / show``."""

import os
from pathlib import Path
from typing import Annotated

import typer

from rmoe_megatron import durable, launch
from rmoe_megatron.cli_options import Bar, Overrides, keeping, parse_numbers, parse_part
from rmoe_megatron.errors import UserError

Processes = Annotated[
    int | None,
    typer.Option(
        min=1,
        max=1024,
        help="That look at samples at the same time; default is all cores.",
        show_default=False,
    ),
]

data_app = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="Build and prepare data.")


@data_app.command("build-shapes")
def build_shapes_command(
    out: Annotated[Path, typer.Argument(help="Folder to create.")],
    train: Annotated[int, typer.Option(min=1, max=10_000_000, help="Training images.")] = 20000,
    val: Annotated[int, typer.Option(min=1, max=1_000_000, help="Validation prompts.")] = 1000,
    seed: Annotated[int, typer.Option(min=0, max=(1 << 32) - 1, help="Of the drawn scenes.")] = 0,
) -> None:
    """Write the toy shapes set as WebDataset shards."""
    launch.require_one_rank("rmoe data build-shapes")
    from rmoe_megatron.data.shapes.build import build_shapes

    build_shapes(out, train, val, seed, progress=Bar("shapes", "image"))


@data_app.command("build-mazes")
def build_mazes_command(
    out: Annotated[Path, typer.Argument(help="Folder to create.")],
    task: Annotated[
        str, typer.Option(help="path (from mark to mark in a maze) or region (that a mark reaches).")
    ] = "region",
    canvas: Annotated[int, typer.Option(min=2, max=64, help="Cells of a side of the pictures.")] = 8,
    train_sides: Annotated[str, typer.Option(help="Sides of the squares of training.")] = "5,6",
    train_steps: Annotated[
        int, typer.Option(min=1, max=4096, help="Most steps of a search in training.")
    ] = 8,
    test_sides: Annotated[str, typer.Option(help="Sides of the squares of the test.")] = "6,7,8",
    test_steps: Annotated[
        str, typer.Option(help="Ends of the ranges of steps in the test.")
    ] = "4,8,12,16,20",
    train: Annotated[int, typer.Option(min=1, max=10_000_000, help="Training grids.")] = 40000,
    val: Annotated[int, typer.Option(min=0, max=1_000_000, help="Validation grids.")] = 512,
    test: Annotated[int, typer.Option(min=0, max=1_000_000, help="Test grids, of all ranges.")] = 1000,
    seed: Annotated[int, typer.Option(min=0, max=(1 << 32) - 1, help="Of the drawn grids.")] = 0,
) -> None:
    """Write mazes as WebDataset shards, with the text encoder that reads them."""
    from rmoe_megatron.data.mazes.build import MazeSettings, build_mazes
    from rmoe_megatron.data.mazes.sample import Task

    launch.require_one_rank("rmoe data build-mazes")
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


@data_app.command("pack")
@keeping("the shards that are finished")
def pack_command(
    source: Annotated[
        Path,
        typer.Argument(
            help="Folder of pictures, table (CSV, TSV, JSONL, Parquet, Arrow), saved Hugging Face data set, or folder of shards."
        ),
    ],
    out: Annotated[Path, typer.Argument(help="Folder to create.")],
    image_column: Annotated[
        str | None,
        typer.Option(help="Of a table: path or bytes of the picture; image, or as it is usually called."),
    ] = None,
    caption_column: Annotated[
        str | None, typer.Option(help="Of a table: its caption; caption, or as it is usually called.")
    ] = None,
    samples_per_shard: Annotated[
        int, typer.Option(min=1, max=1_000_000, help="In every shard but the last.")
    ] = 10_000,
    split: Annotated[
        str | None,
        typer.Option(help="Of a source with several splits: which one (train); all takes them together."),
    ] = None,
) -> None:
    """Write your own pictures and captions as WebDataset shards."""
    launch.require_one_rank("rmoe data pack")
    from rmoe_megatron.data.pack import LEFT_OUT, pack
    from rmoe_megatron.data.pack_rows import Columns

    columns = Columns(image_column, caption_column)
    packed = pack(source, out, columns, samples_per_shard, Bar("pack", "picture"), split)
    print(f"{packed.samples} samples in {packed.shards} shards: {out}")
    if packed.left_out:
        name, reason = packed.left_out[0]
        print(f"{len(packed.left_out)} left out ({out / LEFT_OUT}), the first: {name}: {reason}")
    for column, kind in packed.dropped_columns.items():
        print(f"values of the column {column} are dropped: JSON holds no {kind}")
    for column, count in packed.with_several_captions.items():
        print(
            f"{count} samples have several captions; data.captions=[json:{column}] draws one of them, the default takes the first"
        )
    for note in packed.notes:
        print(note)
    if packed.beside:
        more = f" and {len(packed.beside) - 5} more" if len(packed.beside) > 5 else ""
        print(f"not taken, beside the pictures: {', '.join(packed.beside[:5])}{more}")


@data_app.command("check")
def check_command(
    folder: Annotated[Path, typer.Argument(help="Folder of raw .tar shards.")],
    out: Annotated[Path, typer.Argument(help="Folder to create: table, histograms, a contact sheet.")],
    captions: Annotated[
        list[str] | None,
        typer.Option("--caption", help="txt (the default), caption or json:KEY; repeatable."),
    ] = None,
    processes: Processes = None,
) -> None:
    """Decode every sample and say what there is: sizes, captions, damage, duplicates."""
    launch.require_one_rank("rmoe data check")
    from rmoe_megatron.config.captions import parse_captions
    from rmoe_megatron.data.report import inspect_shards, lines, write_report
    from rmoe_megatron.data.samples import SampleFormat

    sample_format = SampleFormat(captions=parse_captions(captions or ["txt"]))
    durable.require_empty(out, "The output")
    report = inspect_shards(folder, sample_format, Bar("check", "sample"), processes or _cores())
    write_report(report, out)
    print("\n".join(lines(report)))
    print(f"{'pictures':<15}{out}")


@data_app.command("index")
def index_command(
    folder: Annotated[str, typer.Argument(help="Folder of .tar shards, or URL of one.")],
    processes: Annotated[int, typer.Option(min=1, max=256, help="That scan shards at the same time.")] = 1,
    sample_filter: Annotated[
        str | None, typer.Option("--filter", help="The data.filter of a run: it has an index of its own.")
    ] = None,
) -> None:
    """Find the samples of all shards, once; shards that haven't changed since the last time are not read again."""
    launch.require_one_rank("rmoe data index")
    from rmoe_megatron.config.sample_filter import SampleFilter
    from rmoe_megatron.data.indexing import build_index, index_name
    from rmoe_megatron.data.remote_store import shard_store

    parsed = SampleFilter(sample_filter) if sample_filter is not None else None
    store = shard_store(folder)
    index = build_index(store, parsed, processes, Bar("index", "shard"))
    for kind in sorted(index.kinds, key=lambda kind: -kind.samples):
        if kind.samples:
            print(f"{kind.samples:>12} samples with {', '.join(kind.members)}")
    print(f"{len(index):>12} samples in {len(index.shards)} shards")
    paths = store.index_paths(index_name(parsed))
    print(f"index {next((path for path in paths if path.is_file()), 'not written')}")


@data_app.command("precompute")
@keeping("the shards that are finished")
def precompute_command(
    config: Annotated[Path, typer.Argument(help="Configuration whose encoders are used.")],
    source: Annotated[Path, typer.Argument(help="Folder with raw shards, possibly in subfolders.")],
    out: Annotated[Path, typer.Argument(help="Folder to create.")],
    overrides: Overrides = None,
    part: Annotated[
        str, typer.Option(help="K/N: the K-th (from 0) of N processes or jobs that fill OUT together.")
    ] = "0/1",
    check: Annotated[bool, typer.Option("--check", help="Check what is asked for; encode nothing.")] = False,
) -> None:
    """Encode raw shards once into latents and text embeddings; with torchrun or srun each rank encodes its part."""
    from rmoe_megatron.config.loading import load_config
    from rmoe_megatron.precompute.job import check_precompute, precompute

    loaded = load_config(config, overrides or [])
    if check:
        check_precompute(loaded, source, out)
        return
    is_finished = precompute(loaded, source, out, parse_part(part), Bar("precompute", "shard"))
    if launch.speaks():
        print(
            f"{out} is complete"
            if is_finished
            else f"part {part} is done; {out} appears when the last part is"
        )


@data_app.command("show")
def show_command(
    place: Annotated[
        Path, typer.Argument(metavar="PLACE", help="Folder of raw .tar shards, or of a training run.")
    ],
    draw: Annotated[
        int | None,
        typer.Option(
            min=0, max=1 << 40, help="Of a run: the number of the draw, as logs name it.", show_default=False
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            help="Page to write (HTML), or of a draw a PNG; default is PLACE.html, or below PLACE/draws.",
            show_default=False,
        ),
    ] = None,
    config: Annotated[
        Path | None,
        typer.Option(
            help="Configuration to hold the shards against: captions, filter, sizes, tokens.",
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
    from rmoe_megatron.show_draw import show_draw

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
    from rmoe_megatron.config.loading import load_config
    from rmoe_megatron.data.page import SHOWN, write_page
    from rmoe_megatron.data.report import inspect_shards
    from rmoe_megatron.data.samples import SampleFormat
    from rmoe_megatron.encoders.token_counts import token_counter
    from rmoe_megatron.training.preflight import sample_format

    if (folder / "config.yaml").is_file():
        raise UserError(f"{folder} is a run: name one of its draws with --draw, or the folder of its shards.")
    if config is None and overrides:
        raise UserError("Settings override those of a configuration; name it with --config.")
    durable.check_writable(out.parent, "The folder of the page")
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


def _cores() -> int:
    """Return how many cores this process may use."""
    return len(os.sched_getaffinity(0))
