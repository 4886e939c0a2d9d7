"""Helm in a process of its own, for the tests of the chart.

Started by ``conftest``. It reads one JSON list a line, ``[action, chart folder, arguments]``, and answers
each with one JSON object: ``{"result": ...}`` or ``{"error": ...}``. Helm is a Go library, and Go's runtime
sets signal handlers: the process of the other tests must not load it.
"""

import json
import sys

from helm_python import Chart, Config, HelmError, lint


def act(action, chart, arguments):
    if action == "lint":
        return lint(chart, arguments["values"])
    if action == "render":
        return Chart.load(chart).render(**arguments)
    server = arguments.pop("kubeconfig")
    config = Config(kubeconfig_content=server, namespace="llm", qps=1000.0, burst_limit=1000)
    if action in ("install", "upgrade"):
        return getattr(config, action)(Chart.load(chart), "demo", **arguments)
    return getattr(config, action)("demo", **arguments)


def main():
    for line in sys.stdin:
        try:
            answer = {"result": act(*json.loads(line))}
        except HelmError as error:
            answer = {"error": str(error)}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
