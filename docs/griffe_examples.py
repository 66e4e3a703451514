"""Read by mkdocs.yml: a docstring's "Example:" is a section of examples, as griffe calls it."""

from typing import Any

from griffe import Extension, Object


class Examples(Extension):
    """A list of doctests would be read as Markdown otherwise."""

    def on_object(self, *, obj: Object, **_: Any) -> None:
        """Of each class, function, attribute and module, with the docstring that it has."""
        if obj.docstring is not None:
            obj.docstring.value = obj.docstring.value.replace("Example:\n", "Examples:\n")
