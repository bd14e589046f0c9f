"""The vocabulary is closed: what the log layer writes is what the schema says, and nothing else."""

import json
from importlib.resources import files
from pathlib import Path
from typing import Any

import jsonschema
import msgspec
import pytest
from msgspec import inspect

from services.logs import Log
from services.vocabulary import EVENTS, Event, json_schema

# a value for each pattern that the fields of events ask for
PATTERNS = {"^[CSPRIDKcs-][QCDL-]$": "CD"}

REGENERATE = (
    'python -c "import json; from services.vocabulary import json_schema; '
    'print(json.dumps(json_schema(), indent=2))" > services/log.schema.json'
)

VALIDATOR = jsonschema.Draft202012Validator(json_schema())


def sample(kind: inspect.Type, *, null: bool) -> Any:
    """A value that the type allows; null where it may be, if `null`."""
    match kind:
        case inspect.UnionType(types=types):
            nullable = any(isinstance(each, inspect.NoneType) for each in types)
            others = [each for each in types if not isinstance(each, inspect.NoneType)]
            return None if null and nullable else sample(others[0], null=null)
        case inspect.IntType():
            return 7
        case inspect.BoolType():
            return True
        case inspect.LiteralType(values=values):
            return values[0]
        case inspect.ListType(item_type=item):
            return [sample(item, null=null)]
        case inspect.StrType(pattern=str(pattern)):
            return PATTERNS[pattern]
        case inspect.StrType(min_length=least):
            return "x" * (least or 1)
    raise AssertionError(f"no sample for {kind}")


def instance(event: type[Event], *, null: bool) -> Event:
    kind = inspect.type_info(event)
    assert isinstance(kind, inspect.StructType)
    return event(**{field.name: sample(field.type, null=null) for field in kind.fields})


def written(path: Path, event: Event) -> dict[str, Any]:
    """The line of `event` as it comes out of the log layer."""
    log = Log(str(path), "debug", "twisted", instance="blue", worker=3)
    log.emit(event)
    log.close()
    line: dict[str, Any] = json.loads(path.read_text())
    return line


def test_the_shipped_schema_is_the_one_the_vocabulary_generates() -> None:
    shipped = files("services").joinpath("log.schema.json").read_text()
    assert json.loads(shipped) == json_schema(), f"run: {REGENERATE}"


def test_the_schema_is_a_json_schema() -> None:
    jsonschema.Draft202012Validator.check_schema(json_schema())


@pytest.mark.parametrize("null", [pytest.param(False, id="full"), pytest.param(True, id="null")])
@pytest.mark.parametrize("event", EVENTS, ids=lambda event: event.NAME)
def test_every_event_passes_the_log_layer_and_the_schema(
    tmp_path: Path, event: type[Event], null: bool
) -> None:
    said = instance(event, null=null)
    line = written(tmp_path / "log", said)
    VALIDATOR.validate(line)
    assert (line["event"], line["level"]) == (event.NAME, event.LEVEL)
    assert msgspec.structs.asdict(said).items() <= line.items()


@pytest.mark.parametrize("event", EVENTS, ids=lambda event: event.NAME)
def test_no_line_passes_with_a_field_more_or_less_or_another_name(tmp_path: Path, event: type[Event]) -> None:
    line = written(tmp_path / "log", instance(event, null=False))
    assert VALIDATOR.is_valid(line)
    assert not VALIDATOR.is_valid({**line, "colour": "red"})
    assert not VALIDATOR.is_valid({**line, "event": "something_happened"})
    for field in line:
        assert not VALIDATOR.is_valid({name: value for name, value in line.items() if name != field}), field
