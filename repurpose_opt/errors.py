"""Errors that a user can act on: one line each, naming the argument, what it was and what is allowed."""


class RepurposeError(Exception):
    """Base of all errors raised on purpose by this package."""


class InvalidArgument(RepurposeError, ValueError):
    """An argument is outside its domain."""

    def __init__(self, argument: str, got: object, allowed: str) -> None:
        super().__init__(f"{argument}: got {got}; allowed: {allowed}")
        self.argument = argument


class UnknownSolver(RepurposeError, LookupError):
    """No entry point has this name."""


class SolverNotInstalled(RepurposeError, ImportError):
    """The backend is known, a package that it needs is missing."""


class DuplicateSolver(RepurposeError):
    """Two installed distributions register the same name."""


class NoSolution(RepurposeError):
    """A solve ended without an owner vector and the caller needs one."""


class UnsupportedModule(RepurposeError, TypeError):
    """A module of the model cannot be split over workers."""


class PlanError(RepurposeError):
    """A plan folder is damaged, or does not fit the processes that run it."""
