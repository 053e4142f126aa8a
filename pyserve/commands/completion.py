"""``pyserve completion``: a script by which a shell completes commands and flags. Files it completes itself.

bash: ``eval "$(pyserve completion bash)"`` in ~/.bashrc; zsh: ``pyserve completion zsh > ~/.zfunc/_pyserve``; fish:
``pyserve completion fish > ~/.config/fish/completions/pyserve.fish``.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from typing import NamedTuple

SHELLS = ("bash", "zsh", "fish")


def add_completion_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of ``pyserve completion``."""
    parser.add_argument("shell", choices=SHELLS, metavar="SHELL", help=", ".join(SHELLS))


def completion_command(
    shell: str, commands: Mapping[str, str], parser_of: Callable[[str], argparse.ArgumentParser]
) -> int:
    """Prints the script. Exit code 0.

    Args:
        commands: name -> sentence.
        parser_of: the parser of a command, with its arguments.
    """
    flags = {name: _flags(parser_of(name)) for name in commands}
    print({"bash": _bash, "zsh": _zsh, "fish": _fish}[shell](commands, flags), end="")
    return 0


class _Flag(NamedTuple):
    """One flag: what it is for, and whether a value follows it."""

    about: str
    takes_value: bool


_Flags = Mapping[str, Mapping[str, _Flag]]  # command -> flag -> what is known of it


def help_text(action: argparse.Action) -> str:
    """What ``--help`` says of an argument, with its default."""
    return argparse.HelpFormatter("")._expand_help(action) if action.help else ""


def _flags(parser: argparse.ArgumentParser) -> dict[str, _Flag]:
    found = {}
    for action in parser._actions:
        if action.help != argparse.SUPPRESS:
            flag = _Flag(help_text(action).split(";")[0], action.nargs != 0)
            found.update({name: flag for name in action.option_strings if name.startswith("--")})
    return found


def _bash(commands: Mapping[str, str], flags: _Flags) -> str:
    cases = "\n".join(f"        {name}) words='{' '.join(sorted(flags[name]))}' ;;" for name in commands)
    return f"""# bash completion of pyserve
_pyserve() {{
    local current=${{COMP_WORDS[COMP_CWORD]}} words=''
    if [ "$COMP_CWORD" -eq 1 ]; then
        COMPREPLY=($(compgen -W '{" ".join(commands)}' -- "$current"))
        return
    fi
    if [ "${{COMP_WORDS[1]}}" = completion ]; then
        COMPREPLY=($(compgen -W '{" ".join(SHELLS)}' -- "$current"))
        return
    fi
    case ${{COMP_WORDS[1]}} in
{cases}
    esac
    if [[ $current == -* ]]; then
        COMPREPLY=($(compgen -W "$words" -- "$current"))
    else
        COMPREPLY=($(compgen -f -- "$current"))
    fi
}}
complete -o filenames -F _pyserve pyserve
"""


def _zsh(commands: Mapping[str, str], flags: _Flags) -> str:
    listed = "\n".join(f"        {_quoted(f'{name}:{text}')}" for name, text in commands.items())
    cases = "\n".join(f"        {name}) _arguments {_zsh_flags(flags[name])} {_zsh_rest(name)} ;;" for name in commands)
    return f"""#compdef pyserve
_pyserve() {{
    local -a commands
    commands=(
{listed}
    )
    if (( CURRENT == 2 )); then
        _describe command commands
        return
    fi
    local command=$words[2]
    shift words
    (( CURRENT-- ))
    case $command in
{cases}
    esac
}}
if [ "$funcstack[1]" = _pyserve ]; then _pyserve "$@"; else compdef _pyserve pyserve; fi
"""


def _zsh_flags(flags: Mapping[str, _Flag]) -> str:
    return " ".join(
        _quoted(f"{name}[{_plain(flag.about)}]" + ":value:_files" * flag.takes_value)
        for name, flag in sorted(flags.items())
    )


def _zsh_rest(command: str) -> str:
    return f"'1:shell:({' '.join(SHELLS)})'" if command == "completion" else "'*:file:_files'"


def _fish(commands: Mapping[str, str], flags: _Flags) -> str:
    lines = ["# fish completion of pyserve"]
    for name, text in commands.items():
        lines.append(f"complete -c pyserve -n __fish_use_subcommand -a {name} -d {_quoted(text)}")
        for long, flag in sorted(flags[name].items()):
            seen = f"'__fish_seen_subcommand_from {name}'"
            value = " -r" if flag.takes_value else ""
            lines.append(f"complete -c pyserve -n {seen} -l {long[2:]}{value} -d {_quoted(_plain(flag.about))}")
    shells = f"complete -c pyserve -f -n '__fish_seen_subcommand_from completion' -a {_quoted(' '.join(SHELLS))}"
    lines.append(shells)
    return "\n".join(lines) + "\n"


def _plain(text: str) -> str:
    """Without what ends a description in zsh."""
    return text.translate(str.maketrans("[]:", "()-")).replace("\n", " ")


def _quoted(text: str) -> str:
    return "'" + text.replace("'", "'\\''") + "'"
