"""The service as an application with an import path, for Ray Serve's own commands and for KubeRay's RayService.

    serve build gearnn_ray.service.app:app -o service.yaml       with the defaults of jobs/serve.py
    serve deploy gearnn_ray.service.app:build store=s3://bucket/artifacts bundles=street:latest
    serve deploy service.yaml                                    import_path gearnn_ray.service.app:build, and its args

Serve's HTTP proxy, and with it address and port, belong to the cluster here: set them in `http_options`. `host` then only says
whether the service answers under addresses other than loopback.
"""

from pydantic import field_validator
from ray import serve

from gearnn_ray.config.serve import ServeConfig
from gearnn_ray.core.errors import UserError
from gearnn_ray.service.deployment import application
from gearnn_ray.store.signatures import public_key

__all__ = ["Arguments", "app", "build"]


class Arguments(ServeConfig):
    """Arguments of the application: the options of jobs/serve.py. In key=value, a comma separates several values."""

    @field_validator("bundles", "trust", "allowed_hosts", "hosts", mode="before")
    @classmethod
    def _listed(cls, value: object) -> object:
        return tuple(value.split(",")) if isinstance(value, str) else value


def build(arguments: Arguments) -> serve.Application:
    """The application. Reads neither the store nor the cluster: a replica does, and /health tells what it could not load. A GPU
    is used only where `num_gpus` reserves one. Raises UserError for cameras, which only jobs/serve.py keeps open.
    """
    if arguments.watch:
        raise UserError("cameras are kept open only by jobs/serve.py: leave watch out, or serve with that job")
    key = arguments.require_signature and public_key(arguments.require_signature)  # replicas may be on other nodes
    device = arguments.device if arguments.device != "auto" else "cuda" if arguments.num_gpus else "cpu"
    values = arguments.model_dump() | {"device": device, "num_gpus": arguments.num_gpus or 0.0, "require_signature": key}
    return application(ServeConfig.model_validate(values), {})


app = build(Arguments())
