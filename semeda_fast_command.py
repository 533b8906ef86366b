"""Entry of the command `semeda-fast`.

It lies outside the package, since importing the package imports torch: two seconds that a help text and each completion
of the shell would wait for. The package itself stays eager: a program that torch.export or torch.jit saved loads
after a bare `import semeda_fast`, for which the operators have to be there.
"""

from __future__ import annotations

running = False  # whether this process is the command; semeda_fast/__init__.py then imports nothing


def main() -> None:
    """Run the command; what a subcommand needs is imported when it is called."""
    global running
    running = True
    from semeda_fast import cli

    cli.main()
