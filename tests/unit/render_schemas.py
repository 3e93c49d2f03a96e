"""What may stand in a Compose file: a table of field and type, made into a JSON schema that refuses everything else.

Only fields that we use, or could with good reason, after the Compose specification. A field that is misspelled is no
field of the table. The same for Kubernetes is in kubernetes_rules.py.
"""

from __future__ import annotations

from typing import Any

Schema = dict[str, Any]

TEXT: Schema = {"type": "string"}
WORD: Schema = {"type": "string", "minLength": 1}
BOOL: Schema = {"type": "boolean"}
COUNT: Schema = {"type": "integer", "minimum": 0, "maximum": 2**31 - 1}
PATH: Schema = {"type": "string", "pattern": "^/"}


def one_of(*values: str) -> Schema:
    return {"enum": list(values)}


def many(item: Schema, least: int = 0) -> Schema:
    return {"type": "array", "items": item, "minItems": least}


def mapping(value: Schema, key: str = "^.+$") -> Schema:
    return {"type": "object", "patternProperties": {key: value}, "additionalProperties": False}


def fields(required: str = "", /, **types: Schema) -> Schema:
    """An object of these fields and no other; `required` names those that must be there."""
    assert set(required.split()) <= types.keys()
    return {"type": "object", "properties": types, "required": required.split(), "additionalProperties": False}


DURATION: Schema = {"type": "string", "pattern": "^([0-9]+(us|ms|s|m|h))+$"}
SIZE: Schema = {"type": "string", "pattern": "^[0-9]+(b|k|m|g|kb|mb|gb)$"}
SERVICE_NAME = "^[a-zA-Z0-9._-]+$"
SCALARS = mapping({"type": ["string", "number", "boolean", "null"]})
FILE_REFERENCE = fields("source", source=WORD, target=TEXT, uid=TEXT, gid=TEXT, mode={"type": ["number", "string"]})
DEVICE = fields(
    "capabilities",
    capabilities=many(WORD, 1),
    count={"type": ["integer", "string"]},
    device_ids=many(WORD, 1) | {"uniqueItems": True},
    driver=WORD,
)
LIMITS: dict[str, Schema] = {"cpus": {"type": ["number", "string"]}, "memory": SIZE}
SERVICE = fields(
    "image",
    image=WORD,
    command=many(TEXT),
    configs=many(FILE_REFERENCE),
    depends_on=mapping(
        fields(
            "condition",
            condition=one_of("service_started", "service_healthy", "service_completed_successfully"),
            required=BOOL,
            restart=BOOL,
        ),
        SERVICE_NAME,
    ),
    deploy=fields(
        resources=fields(limits=fields(**LIMITS), reservations=fields(**LIMITS, devices=many(DEVICE))),
        replicas=COUNT,
    ),
    entrypoint=many(TEXT, 1),
    env_file=many(fields("path", path=WORD, required=BOOL)),
    environment=SCALARS,
    healthcheck=fields(
        "test", test=many(TEXT, 2), interval=DURATION, timeout=DURATION, retries=COUNT, start_period=DURATION
    ),
    hostname=WORD,
    init=BOOL,
    ports=many(TEXT),
    read_only=BOOL,
    restart=WORD,
    secrets=many(FILE_REFERENCE),
    shm_size=SIZE,
    stop_grace_period=DURATION,
    tmpfs=many({"type": "string", "pattern": "^/[^:]+(:[a-z]+(=[a-z0-9]+)?(,[a-z]+(=[a-z0-9]+)?)*)?$"}),
    user=TEXT,
    volumes=many(
        fields("type target", type=one_of("bind", "volume", "tmpfs"), source=WORD, target=PATH, read_only=BOOL)
    ),
    working_dir=PATH,
)
COMPOSE = fields(
    "services",
    name={"type": "string", "pattern": "^[a-z0-9][a-z0-9_-]*$"},
    services=mapping(SERVICE, SERVICE_NAME),
    configs=mapping(fields(content=TEXT, file=TEXT, environment=WORD), SERVICE_NAME),
    secrets=mapping(fields(environment=WORD, file=TEXT), SERVICE_NAME),
    volumes=mapping(fields(name=WORD, driver=WORD, external=BOOL), SERVICE_NAME),
)
