"""A JSON Schema for the manifests in deploy/, written by hand: the fields that they use, as KubeRay 1.6's custom resource
definitions (ray.io/v1) and Kubernetes' pods have them. Stricter than these: a field that is not named here is an error, because
the operator ignores fields that it does not know. The definitions themselves have 900 KB each, nearly all of it the pod template.
"""

from typing import Any

Schema = dict[str, Any]

TEXT, WHOLE, YES_NO = {"type": "string"}, {"type": "integer"}, {"type": "boolean"}
COUNT = {"type": "integer", "minimum": 0}
TEXTS = {"type": "object", "additionalProperties": TEXT}
QUANTITY = {"type": "string", "pattern": r"^([0-9]+(\.[0-9]*)?|\.[0-9]+)([KMGTPE]i|[numkMGTPE])?$"}
NAME = {"type": "string", "pattern": "^[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?$"}
PORT = {"type": "integer", "minimum": 1, "maximum": 65535}


def fields(*required: str, **properties: Schema) -> Schema:
    return {"type": "object", "properties": properties, "required": [*required], "additionalProperties": False}


def each(items: Schema) -> Schema:
    return {"type": "array", "items": items, "minItems": 1}


_AMOUNTS = {"type": "object", "additionalProperties": QUANTITY}
_RESOURCES = fields(requests=_AMOUNTS, limits=_AMOUNTS)
_SECCOMP = fields("type", type={"enum": ["RuntimeDefault", "Unconfined", "Localhost"]}, localhostProfile=TEXT)
_CONTAINER_SECURITY = fields(
    runAsNonRoot=YES_NO, runAsUser=COUNT, runAsGroup=COUNT, allowPrivilegeEscalation=YES_NO, readOnlyRootFilesystem=YES_NO,
    privileged=YES_NO, capabilities=fields(add=each(TEXT), drop=each(TEXT)), seccompProfile=_SECCOMP,
)  # fmt: skip
_POD_SECURITY = fields(
    runAsNonRoot=YES_NO, runAsUser=COUNT, runAsGroup=COUNT, fsGroup=COUNT, seccompProfile=_SECCOMP
)  # fmt: skip
_PROBE = fields(
    httpGet=fields("port", path=TEXT, port=PORT, scheme={"enum": ["HTTP", "HTTPS"]}),
    initialDelaySeconds=COUNT, periodSeconds=COUNT, timeoutSeconds=COUNT, failureThreshold=COUNT, successThreshold=COUNT,
)  # fmt: skip
_CONTAINER = fields(
    "name", name=NAME, image=TEXT, ports=each(fields("containerPort", name=NAME, containerPort=PORT)), resources=_RESOURCES,
    securityContext=_CONTAINER_SECURITY, livenessProbe=_PROBE, readinessProbe=_PROBE,
    volumeMounts=each(fields("name", "mountPath", name=NAME, mountPath=TEXT, readOnly=YES_NO)),
)  # fmt: skip
_VOLUME = fields("name", "emptyDir", name=NAME, emptyDir=fields(medium={"enum": ["", "Memory"]}, sizeLimit=QUANTITY))
_POD_TEMPLATE = fields(
    "spec",
    spec=fields(
        "containers", containers=each(_CONTAINER), volumes=each(_VOLUME), securityContext=_POD_SECURITY, serviceAccountName=NAME,
        automountServiceAccountToken=YES_NO, restartPolicy={"enum": ["Always", "OnFailure", "Never"]},
    ),
)  # fmt: skip
_CLUSTER = fields(
    "headGroupSpec",
    rayVersion=TEXT,
    authOptions=fields(mode={"enum": ["disabled", "token"]}, secretName=NAME),
    enableInTreeAutoscaling=YES_NO,
    autoscalerOptions=fields(idleTimeoutSeconds=COUNT, resources=_RESOURCES, securityContext=_CONTAINER_SECURITY),
    headGroupSpec=fields("template", rayStartParams=TEXTS, template=_POD_TEMPLATE),
    workerGroupSpecs=each(
        fields(
            "groupName", "template", groupName=NAME, replicas=COUNT, minReplicas=COUNT, maxReplicas=COUNT, rayStartParams=TEXTS,
            template=_POD_TEMPLATE,
        )
    ),
)  # fmt: skip
_SPECS = {
    "RayCluster": _CLUSTER,
    "RayJob": fields(
        "entrypoint", "rayClusterSpec",
        entrypoint=TEXT, backoffLimit=COUNT,
        submissionMode={"enum": ["K8sJobMode", "HTTPMode", "InteractiveMode", "SidecarMode"]},
        activeDeadlineSeconds=COUNT, shutdownAfterJobFinishes=YES_NO, ttlSecondsAfterFinished=COUNT,
        submitterPodTemplate=_POD_TEMPLATE, rayClusterSpec=_CLUSTER,
    ),
    "RayService": fields("serveConfigV2", "rayClusterConfig", serveConfigV2=TEXT, rayClusterConfig=_CLUSTER),
}  # fmt: skip


def schema_of(kind: str) -> Schema:
    """Of a whole manifest of this kind."""
    return fields(
        "apiVersion", "kind", "metadata", "spec", apiVersion={"const": "ray.io/v1"}, kind={"const": kind},
        metadata=fields("name", name=NAME, labels=TEXTS, annotations=TEXTS), spec=_SPECS[kind],
    )  # fmt: skip
