"""Why the samples of a set cannot be used, and what to do about it, told by the members that samples have."""

from collections.abc import Callable

from rmoe_megatron.data.shards.index import IMAGES, OTHER_IMAGES

CAPTIONS = ("txt", "caption", "json")


def what_to_do(kinds: list[set[str]]) -> str:
    """Return what is probably wrong with a set none of whose samples can be used.

    Args:
        kinds: the extensions of the members of each kind of sample.
    """
    names = sorted(set().union(*kinds))
    dotted = next((name for name in names if "." in name and name.rpartition(".")[2] in IMAGES), None)
    if dotted is not None:
        return (
            f"there are members *.{dotted}: of a name with several dots all from the first on is the kind, as WebDataset has it, so "
            "unpack them and run `rmoe data pack`"
        )
    other = next((name for name in names if name.rpartition(".")[2] in OTHER_IMAGES), None)
    if other is not None and not any(kind & set(IMAGES) for kind in kinds):
        return (
            f"their pictures are *.{other}, and training takes {', '.join(IMAGES)}: convert them (`mogrify -format png *.{other}`) and "
            "run `rmoe data pack`"
        )
    pictures = [kind for kind in kinds if not kind.isdisjoint(IMAGES)]
    captions = [name for name in CAPTIONS if any(name in kind for kind in pictures)]
    if captions:
        sources = ", ".join("json:KEY" if name == "json" else name for name in captions)
        return f"captions may lie in {', '.join(captions)}: say so with data.captions=[{sources}] (`rmoe data check --caption`)"
    if pictures and len(pictures) < len(kinds):
        return (
            "pictures and what belongs to them lie in different shards or under different names: the members of a sample are in one "
            "shard, and their paths are the same up to the first dot, folders included"
        )
    return "build the data again"


def apart(kinds: list[set[str]], is_usable: Callable[[set[str]], bool]) -> str:
    """Return a remark if samples that are left out would be usable together, or nothing.

    Args:
        kinds: as in :func:`what_to_do`, of what is left out.
    """
    if len(kinds) > 1 and is_usable(set().union(*kinds)):
        return (
            "; some would be usable together, but lie in different shards or under different names (the members of a sample are in one "
            "shard, and their paths are the same up to the first dot)"
        )
    return ""
