"""NetworkPolicies as nftables rules in each pod's own network namespace, as a network plugin enforces them.

Knows what the chart renders: selectors by matchLabels, peers in the pods' own namespace, ports by number. It
raises for everything else. As in Kubernetes, a pod's calls to itself, answers, and calls of its own node are
open always. Packets that no policy lets through are dropped and recorded. Used by ``kubelet``.
"""

import json
import subprocess

TABLE = "inet policies"
RECORD = "add @refused { meta l4proto . ip saddr . ip daddr . th dport }"
CHAINS = {
    # Kubernetes' name: the chain, the interface and the address of the other end.
    "Ingress": ("input", "iifname", "saddr"),
    "Egress": ("output", "oifname", "daddr"),
}
PEERS = {"Ingress": "from", "Egress": "to"}


def ruleset(labels, policies, pods, *, node):
    """The script for nft in the namespace of a pod with these labels. ``policies``: the NetworkPolicies of
    its Kubernetes namespace. ``pods``: (labels, address) of all pods there. ``node``: the node's address."""
    selecting = [each["spec"] for each in policies if _selects(each["spec"]["podSelector"], labels)]
    lines = [
        f"add table {TABLE}",
        f"add set {TABLE} refused {{ type inet_proto . ipv4_addr . ipv4_addr . inet_service;"
        " flags dynamic; size 65535; }",
    ]
    for direction, (chain, interface, other) in CHAINS.items():
        isolating = [spec for spec in selecting if direction in spec["policyTypes"]]
        if not isolating:
            continue
        lines.append(f"add chain {TABLE} {chain} {{ type filter hook {chain} priority 0; policy drop; }}")
        lines.append(f"flush chain {TABLE} {chain}")
        allowed = [f"{interface} lo accept", "ct state established,related accept"]
        if direction == "Ingress":
            allowed.append(f"ip saddr {node} accept")
        for spec in isolating:
            for rule in spec.get(direction.lower()) or ():
                allowed += _allowed(rule, PEERS[direction], other, pods)
        lines += [f"add rule {TABLE} {chain} {each}" for each in allowed]
        lines.append(f"add rule {TABLE} {chain} meta l4proto {{ tcp, udp }} {RECORD}")
    return "\n".join(lines) + "\n"


def _selects(selector, labels):
    assert selector.keys() <= {"matchLabels"}, selector
    return selector.get("matchLabels", {}).items() <= labels.items()


def _allowed(rule, key, other, pods):
    """The nft rules of one rule of a policy."""
    assert rule.keys() <= {key, "ports"}, rule
    peer = ""
    if rule.get(key):
        assert all(each.keys() == {"podSelector"} for each in rule[key]), rule
        selectors = [each["podSelector"] for each in rule[key]]
        addresses = [at for labels, at in pods if any(_selects(each, labels) for each in selectors)]
        if not addresses:
            return
        peer = f"ip {other} {{ {', '.join(addresses)} }} "
    ports = {}
    for each in rule.get("ports") or ():
        assert each.keys() <= {"port", "endPort", "protocol"}, each
        last = f"-{each['endPort']}" if "endPort" in each else ""
        ports.setdefault(each.get("protocol", "TCP").lower(), []).append(f"{int(each['port'])}{last}")
    for protocol, numbers in ports.items():
        yield f"{peer}{protocol} dport {{ {', '.join(numbers)} }} accept"
    if not ports:
        yield f"{peer}accept"


def apply(namespace, script):
    """Replaces the rules of a network namespace, all at once."""
    _nft(namespace, ["-f", "-"], script)


def refused(namespace):
    """{(protocol, source, destination, port)} of the packets that were dropped."""
    (found,) = (
        each["set"]
        for each in json.loads(_nft(namespace, ["-j", "list", "set", *TABLE.split(), "refused"]))["nftables"]
        if "set" in each
    )
    return {tuple(_value(each)["concat"]) for each in found.get("elem", ())}


def _value(element):
    return element["elem"]["val"] if "elem" in element else element


def _nft(namespace, arguments, given=""):
    command = ["nsenter", f"--net=/run/netns/{namespace}", "nft", *arguments]
    done = subprocess.run(command, input=given, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, f"{arguments}: {done.stderr}\n{given}"
    return done.stdout
