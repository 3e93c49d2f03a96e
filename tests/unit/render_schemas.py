"""What may stand in rendered files: tables of field and type, made into JSON schemas that refuse everything else.

Only fields that we use, or could with good reason, after KubeRay's ray.io/v1 definitions (authOptions since 1.5.1,
preRunningDeadlineSeconds since 1.6), Kubernetes' core objects, and the Compose specification. A field that is
misspelled is no field of the table.
"""

from __future__ import annotations

from typing import Any

Schema = dict[str, Any]

TEXT: Schema = {"type": "string"}
WORD: Schema = {"type": "string", "minLength": 1}
BOOL: Schema = {"type": "boolean"}
COUNT: Schema = {"type": "integer", "minimum": 0, "maximum": 2**31 - 1}
PORT: Schema = {"type": "integer", "minimum": 1, "maximum": 65535}
# Names of objects and of volumes, which are DNS labels.
NAME: Schema = {"type": "string", "pattern": "^[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?$"}
# Those of Secrets, which may have dots.
SECRET_NAME: Schema = {"type": "string", "pattern": r"^[a-z0-9]([a-z0-9.-]{0,251}[a-z0-9])?$"}
PATH: Schema = {"type": "string", "pattern": "^/"}
# 500m, 4, 16Gi.
QUANTITY: Schema = {"anyOf": [COUNT, {"type": "string", "pattern": r"^[0-9]+(\.[0-9]+)?(m|[KMGTP]i?)?$"}]}


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


# ------------------------------------------------------------------------------------------ Kubernetes
METADATA = fields("name", name=NAME, namespace=NAME, labels=mapping(TEXT), annotations=mapping(TEXT))
RESOURCES = fields(limits=mapping(QUANTITY), requests=mapping(QUANTITY))
SECCOMP = fields("type", type=one_of("RuntimeDefault", "Unconfined", "Localhost"), localhostProfile=TEXT)
CONTAINER_SECURITY = fields(
    allowPrivilegeEscalation=BOOL,
    capabilities=fields(add=many(WORD), drop=many(WORD)),
    privileged=BOOL,
    readOnlyRootFilesystem=BOOL,
    runAsGroup=COUNT,
    runAsNonRoot=BOOL,
    runAsUser=COUNT,
    seccompProfile=SECCOMP,
)
POD_SECURITY = fields(
    fsGroup=COUNT,
    fsGroupChangePolicy=one_of("OnRootMismatch", "Always"),
    runAsGroup=COUNT,
    runAsNonRoot=BOOL,
    runAsUser=COUNT,
    seccompProfile=SECCOMP,
    supplementalGroups=many(COUNT),
)
ENV = fields("name", name=WORD, value=TEXT, valueFrom=fields(fieldRef=fields("fieldPath", fieldPath=WORD)))
ENV_FROM = fields(prefix=TEXT, secretRef=fields("name", name=SECRET_NAME, optional=BOOL))
PROBE = fields(
    "httpGet",
    httpGet=fields("port", path=PATH, port=PORT, scheme=one_of("HTTP", "HTTPS")),
    initialDelaySeconds=COUNT,
    periodSeconds=COUNT,
    timeoutSeconds=COUNT,
    failureThreshold=COUNT,
    successThreshold=COUNT,
)
CONTAINER = fields(
    "name image",
    name=NAME,
    image=WORD,
    imagePullPolicy=one_of("Always", "IfNotPresent", "Never"),
    command=many(TEXT),
    args=many(TEXT),
    env=many(ENV),
    envFrom=many(ENV_FROM),
    ports=many(fields("containerPort", name={"type": "string", "maxLength": 15}, containerPort=PORT)),
    resources=RESOURCES,
    securityContext=CONTAINER_SECURITY,
    livenessProbe=PROBE,
    readinessProbe=PROBE,
    volumeMounts=many(fields("name mountPath", name=NAME, mountPath=PATH, readOnly=BOOL, subPath=TEXT)),
    workingDir=PATH,
)
VOLUME = fields(
    "name",
    name=NAME,
    configMap=fields("name", name=NAME, defaultMode=COUNT, items=many(fields("key path", key=WORD, path=WORD))),
    emptyDir=fields(medium=one_of("", "Memory"), sizeLimit=QUANTITY),
    persistentVolumeClaim=fields("claimName", claimName=NAME, readOnly=BOOL),
)
TOLERATION = fields(
    key=WORD,
    operator=one_of("Exists", "Equal"),
    value=TEXT,
    effect=one_of("NoSchedule", "PreferNoSchedule", "NoExecute"),
)
POD_TEMPLATE = fields(
    "spec",
    metadata=fields(labels=mapping(TEXT), annotations=mapping(TEXT)),
    spec=fields(
        "containers",
        automountServiceAccountToken=BOOL,
        containers=many(CONTAINER, 1),
        imagePullSecrets=many(fields("name", name=SECRET_NAME)),
        nodeSelector=mapping(TEXT),
        restartPolicy=one_of("Always", "OnFailure", "Never"),
        securityContext=POD_SECURITY,
        serviceAccountName=NAME,
        terminationGracePeriodSeconds=COUNT,
        tolerations=many(TOLERATION),
        volumes=many(VOLUME),
    ),
)
RAY_START_PARAMS = mapping(TEXT, "^[a-z][a-z-]*$")
HEAD_GROUP = fields(
    "template rayStartParams",
    rayStartParams=RAY_START_PARAMS,
    serviceType=one_of("ClusterIP", "NodePort", "LoadBalancer"),
    enableIngress=BOOL,
    template=POD_TEMPLATE,
)
WORKER_GROUP = fields(
    "groupName minReplicas maxReplicas rayStartParams template",
    groupName=NAME,
    replicas=COUNT,
    minReplicas=COUNT,
    maxReplicas=COUNT,
    numOfHosts=COUNT,
    idleTimeoutSeconds=COUNT,
    rayStartParams=RAY_START_PARAMS,
    template=POD_TEMPLATE,
)
AUTOSCALER = fields(
    idleTimeoutSeconds=COUNT,
    image=WORD,
    imagePullPolicy=one_of("Always", "IfNotPresent", "Never"),
    resources=RESOURCES,
    securityContext=CONTAINER_SECURITY,
    env=many(ENV),
    upscalingMode=one_of("Default", "Aggressive", "Conservative"),
    version=one_of("v1", "v2"),
)
RAY_CLUSTER = fields(
    "headGroupSpec",
    authOptions=fields("mode", mode=one_of("disabled", "token"), secretName=NAME),
    autoscalerOptions=AUTOSCALER,
    enableInTreeAutoscaling=BOOL,
    headGroupSpec=HEAD_GROUP,
    # Of 2.52 and newer, which the operator wants for tokens.
    rayVersion={"type": "string", "pattern": r"^2\.(5[2-9]|[6-9][0-9])\.[0-9]+$"},
    suspend=BOOL,
    workerGroupSpecs=many(WORKER_GROUP, 1),
)
# The operator takes 47 characters, and names services after it: a letter comes first.
JOB_NAME: Schema = {"type": "string", "pattern": "^[a-z]([a-z0-9-]{0,45}[a-z0-9])?$"}
RAY_JOB = fields(
    "apiVersion kind metadata spec",
    apiVersion=one_of("ray.io/v1"),
    kind=one_of("RayJob"),
    metadata=METADATA | {"properties": METADATA["properties"] | {"name": JOB_NAME}},
    spec=fields(
        "entrypoint rayClusterSpec",
        activeDeadlineSeconds=COUNT,
        backoffLimit=COUNT,
        entrypoint=WORD,
        jobId=TEXT,
        metadata=mapping(TEXT),
        # Since 1.6.
        preRunningDeadlineSeconds=COUNT,
        rayClusterSpec=RAY_CLUSTER,
        runtimeEnvYAML=TEXT,
        shutdownAfterJobFinishes=BOOL,
        submissionMode=one_of("K8sJobMode", "HTTPMode", "InteractiveMode", "SidecarMode"),
        submitterConfig=fields(backoffLimit=COUNT),
        submitterPodTemplate=POD_TEMPLATE,
        suspend=BOOL,
        ttlSecondsAfterFinished=COUNT,
    ),
)
CONFIG_MAP = fields(
    "apiVersion kind metadata data",
    apiVersion=one_of("v1"),
    kind=one_of("ConfigMap"),
    metadata=METADATA,
    data=mapping(TEXT, "^[A-Za-z0-9._-]+$"),
)
ACCESS_MODES = one_of("ReadWriteOnce", "ReadOnlyMany", "ReadWriteMany", "ReadWriteOncePod")
CLAIM = fields(
    "apiVersion kind metadata spec",
    apiVersion=one_of("v1"),
    kind=one_of("PersistentVolumeClaim"),
    metadata=METADATA,
    spec=fields("accessModes resources", accessModes=many(ACCESS_MODES, 1), resources=RESOURCES, storageClassName=NAME),
)
POD = fields(
    "apiVersion spec",
    apiVersion=one_of("v1"),
    spec=POD_TEMPLATE["properties"]["spec"],
)
KUBERNETES = {"ConfigMap": CONFIG_MAP, "PersistentVolumeClaim": CLAIM, "RayJob": RAY_JOB}

# ------------------------------------------------------------------------------------------ Compose
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
