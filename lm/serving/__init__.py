"""A trained run behind an HTTP server with OpenAI's endpoints, to try it; not for many users."""

from lm.serving.server import Options, Server, check_options, example, serving
