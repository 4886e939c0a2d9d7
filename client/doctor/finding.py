"""A finding of the doctor, and the identity of the release it is about; every check uses both."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Finding:
    """``check``: the name of the check. ``subject``: the object, such as ``pod demo-farshore-head``.
    ``problem``: a sentence, with Kubernetes' own words where it has some. ``fix``: what to do."""

    check: str
    subject: str
    problem: str
    fix: str


@dataclass(frozen=True, slots=True)
class Release:
    """A release of the chart ``helm/farshore``, by Helm's name of it."""

    name: str
    namespace: str

    @property
    def selector(self) -> str:
        """The label selector of its objects and pods: see ``helm/farshore/templates/_names.tpl``."""
        return f"app.kubernetes.io/instance={self.name},app.kubernetes.io/part-of=farshore"
