"""The command train: an option for each setting of `Config`."""

from __future__ import annotations

from dataclasses import MISSING, Field, fields
from inspect import Parameter, Signature
from itertools import groupby
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

import typer
from typer.core import TyperCommand

from fastsiam.cli.exit import EXIT_CODES, exit_codes
from fastsiam.cli.options import Quiet, split_columns
from fastsiam.cli.screen import speaks, train_on_screen
from fastsiam.training.config import PRESETS, Config

app = typer.Typer()


class _Grouped(TyperCommand):
    """A command whose help lists its options under headings."""

    def format_options(self, ctx: Any, formatter: Any) -> None:
        for group, options in groupby(self.get_params(ctx), _group):
            rows = [record for each in options if (record := each.get_help_record(ctx))]
            with formatter.section(group):
                formatter.write_dl(rows)


def _group(option: Any) -> str:
    return option.rich_help_panel or "Other"


def _option(setting: Field[Any], hint: Any) -> Parameter:
    """Return a parameter of the command, whose default None leaves the recipe's value."""
    about = setting.metadata
    required = setting.default is MISSING
    kinds = [kind for kind in get_args(hint) if kind is not NoneType]
    if get_origin(hint) is UnionType:
        (hint,) = kinds
    if get_origin(hint) is Literal or about["metavar"] == "LEFT,RIGHT,SCORE":
        hint = str
    elif hint == tuple[Path, ...]:
        hint = list[Path]
    name, default = setting.name.replace("_", "-"), _default(setting)
    option = typer.Option(
        f"--{name}/--no-{name}" if hint is bool else f"--{name}",
        metavar=about["metavar"],
        help=f"{about['help']}  [default: {default}]" if default else about["help"],
        rich_help_panel=about["group"],
        show_default=False,
    )
    return Parameter(
        setting.name,
        Parameter.KEYWORD_ONLY,
        default=Parameter.empty if required else None,
        annotation=Annotated[hint if required else hint | None, option],
    )


def _default(setting: Field[Any]) -> str:
    """Return a setting's default, and its value in recipes that differ; empty for none."""

    def shown(value: object) -> str:
        if value is None:
            return str(setting.metadata["unset"])
        return {True: "yes", False: "no"}[value] if isinstance(value, bool) else str(value)

    others = [
        f"{name} {shown(values[setting.name])}"
        for name, values in PRESETS.items()
        if setting.name in values
    ]
    usual = [] if setting.default is MISSING else [shown(setting.default)]
    return ", ".join([*usual, *others])


def _signature() -> Signature:
    """Return the signature of the command."""
    hints = get_type_hints(Config)
    preset = typer.Option(
        metavar="|".join(PRESETS),
        help="The recipe; another option wins over it.",
        rich_help_panel="Files",
    )
    keyword = Parameter.KEYWORD_ONLY
    return Signature(
        [
            Parameter("preset", keyword, default="fast", annotation=Annotated[str, preset]),
            *(_option(setting, hints[setting.name]) for setting in fields(Config)),
            Parameter("quiet", keyword, default=False, annotation=Quiet),
        ]
    )


def train_command(preset: str, quiet: bool, **settings: Any) -> None:
    """Train on scored sentence pairs."""
    with exit_codes():
        settings["vectors"] = tuple(settings["vectors"])
        settings["columns"] = split_columns(settings["columns"], "LEFT,RIGHT,SCORE")
        # an option that was not given leaves the recipe's own
        given = {name: value for name, value in settings.items() if value is not None}
        train_on_screen(Config.preset(preset, **given), quiet)
        if speaks():
            typer.echo(f"run folder: {settings['out']}")


train_command.__signature__ = _signature()  # type: ignore[attr-defined]
app.command("train", cls=_Grouped, epilog=EXIT_CODES)(train_command)
