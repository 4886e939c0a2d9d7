{{/* What a schema cannot express: values that contradict one another, or what runs. Each check fails with the name
of a key. */}}

{{/* A size such as 512MiB, 4Gi or 4G in bytes: units with an i are powers of 1024. */}}
{{- define "farshore.bytes" -}}
{{- $number := regexFind "^[0-9.]+" . | float64 -}}
{{- $unit := regexFind "[A-Za-z]+$" . | lower | trimSuffix "b" -}}
{{- $power := index (dict "" 0 "k" 1 "m" 2 "g" 3 "t" 4) (trimSuffix "i" $unit) -}}
{{- range until (int $power) }}{{ $number = mulf $number (ternary 1024.0 1000.0 (hasSuffix "i" $unit)) }}{{ end -}}
{{- $number | int64 -}}
{{- end }}

{{/* 2, 0.5 or "500m" in thousandths of a core. */}}
{{- define "farshore.millicores" -}}
{{- $text := toString . -}}
{{- ternary (trimSuffix "m" $text | float64) (mulf (float64 $text) 1000.0) (hasSuffix "m" $text) | int64 -}}
{{- end }}

{{- define "farshore.check" -}}
{{- include "farshore.checkName" . -}}
{{- include "farshore.checkGroups" . -}}
{{- include "farshore.checkGateway" . -}}
{{- include "farshore.checkPorts" . -}}
{{- include "farshore.checkRequests" . -}}
{{- include "farshore.checkRedis" . -}}
{{- include "farshore.checkPod" (list "gateway" (include "farshore.gatewayPod" . | fromYaml).spec) -}}
{{- range $component := list "head" "dense" "attention" -}}
{{- $pod := include "farshore.rayPod" (list $ $component (index $.Values $component)) | fromYaml -}}
{{- include "farshore.checkPod" (list $component $pod.spec) -}}
{{- end -}}
{{- end }}

{{- define "farshore.checkName" -}}
{{- $name := include "farshore.fullname" . -}}
{{- if not (regexMatch "^[a-z]([a-z0-9-]*[a-z0-9])?$" $name) -}}
{{- fail (printf "%s is no name of a Service: set fullnameOverride to one that begins with a letter" $name) -}}
{{- end -}}
{{- end }}

{{- define "farshore.checkGroups" -}}
{{- range $name := list "dense" "attention" -}}
{{- $group := index $.Values $name -}}
{{- $limit := include "farshore.bytes" $group.resources.limits.memory | int64 -}}
{{- $key := ternary "denseKvMemory" "kvMemory" (and (eq $name "dense") (not (empty $.Values.spec.denseKvMemory))) -}}
{{- $size := index $.Values.spec $key -}}
{{- $each := add (include "farshore.bytes" $size | int64) (mul 320 1048576) -}}
{{- $what := printf "spec.%s %s and 320Mi" $key $size -}}
{{- if $group.gpu.enabled -}}
{{- $each = mul 4096 1048576 -}}
{{- $what = "4Gi (KV and weights are on the GPU)" -}}
{{- end -}}
{{- $least := mul $group.workersPerPod $each -}}
{{- if lt $limit $least -}}
{{- fail (printf "%s.resources.limits.memory: %v is too little: %v workers with %s each need %dMi, and Ray some more" $name $group.resources.limits.memory $group.workersPerPod $what (div $least 1048576)) -}}
{{- end -}}
{{- if lt (float64 $group.terminationGracePeriodSeconds) (addf $.Values.spec.drainTimeout 20.0) -}}
{{- fail (printf "%s.terminationGracePeriodSeconds: %v must be at least spec.drainTimeout (%v) and 20 more, which Ray takes to begin a drain and to end, or a drain is cut off" $name $group.terminationGracePeriodSeconds $.Values.spec.drainTimeout) -}}
{{- end -}}
{{- end -}}
{{- end }}

{{- define "farshore.checkGateway" -}}
{{- $grace := .Values.gateway.terminationGracePeriodSeconds -}}
{{- if le (float64 $grace) (addf .Values.gateway.preStopSeconds .Values.gateway.drainTimeout) -}}
{{- fail (printf "gateway.terminationGracePeriodSeconds: %v must be more than preStopSeconds and drainTimeout together, or a drain is cut off" $grace) -}}
{{- end -}}
{{- $scale := .Values.gateway.autoscaling -}}
{{- if and $scale.enabled (gt (int $scale.minReplicas) (int $scale.maxReplicas)) -}}
{{- fail (printf "gateway.autoscaling.minReplicas: %v is more than maxReplicas, %v" $scale.minReplicas $scale.maxReplicas) -}}
{{- end -}}
{{- end }}

{{/* All pods listen on ray.ports, the head also on launcher.controllerPort: no two may meet. */}}
{{- define "farshore.checkPorts" -}}
{{- $taken := dict (toString .Values.launcher.controllerPort) "launcher.controllerPort" -}}
{{- $ranges := dict -}}
{{- range $key, $port := .Values.ray.ports -}}
{{- $name := printf "ray.ports.%s" $key -}}
{{- if kindIs "map" $port -}}
{{- if gt (int $port.low) (int $port.high) -}}
{{- fail (printf "%s: low, %v, is more than high, %v" $name $port.low $port.high) -}}
{{- end -}}
{{- range $other, $range := $ranges -}}
{{- if and (le (int $port.low) (int $range.high)) (le (int $range.low) (int $port.high)) -}}
{{- fail (printf "%s: it has ports of %s" $name $other) -}}
{{- end -}}
{{- end -}}
{{- $_ := set $ranges $name $port -}}
{{- else -}}
{{- with get $taken (toString $port) -}}
{{- fail (printf "%s: %v is already %s" $name $port .) -}}
{{- end -}}
{{- $_ := set $taken (toString $port) $name -}}
{{- end -}}
{{- end -}}
{{- range $port, $name := $taken -}}
{{- range $other, $range := $ranges -}}
{{- if and (ge (int $port) (int $range.low)) (le (int $port) (int $range.high)) -}}
{{- fail (printf "%s: %v is one of %s" $name $port $other) -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- end }}

{{/* Kubernetes refuses such pods, and of a RayCluster only when KubeRay makes them. */}}
{{- define "farshore.checkRequests" -}}
{{- $all := dict "initResources" .Values.initResources -}}
{{- range $name := list "head" "launcher" "dense" "attention" "gateway" -}}
{{- $values := index $.Values $name -}}
{{- $resources := deepCopy $values.resources -}}
{{- if dig "gpu" "enabled" false $values }}{{ $_ := set $resources.limits $values.gpu.resource $values.workersPerPod }}{{ end -}}
{{- $_ := set $all (printf "%s.resources" $name) $resources -}}
{{- end -}}
{{- $_ := set $all "redis.bundled.resources" .Values.redis.bundled.resources -}}
{{- $_ := set $all "model.init.resources" .Values.model.init.resources -}}
{{- range $name, $resources := $all -}}
{{- range $key, $request := $resources.requests -}}
{{- $limit := dig "limits" $key "" $resources | toString -}}
{{- $amount := ternary "farshore.millicores" "farshore.bytes" (eq $key "cpu") -}}
{{- if and $limit (gt (include $amount (toString $request) | int64) (include $amount $limit | int64)) -}}
{{- fail (printf "%s.requests.%s: %v is more than the limit, %v" $name $key $request $limit) -}}
{{- end -}}
{{- if and (or (contains "/" $key) (hasPrefix "hugepages-" $key)) (ne (toString $request) $limit) -}}
{{- fail (printf "%s.requests.%s: %v must be the limit, which is %s: leave the request out" $name $key $request (default "missing" $limit)) -}}
{{- end -}}
{{- end -}}
{{- range $key, $limit := $resources.limits -}}
{{- if hasPrefix "hugepages-" $key -}}
{{- $page := include "farshore.bytes" (trimPrefix "hugepages-" $key) | int64 -}}
{{- $size := include "farshore.bytes" $limit | int64 -}}
{{- if or (eq $size 0) (ne (mod $size $page) 0) -}}
{{- fail (printf "%s.limits.%s: %v is no multiple of a page" $name $key $limit) -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- end }}

{{/* A pod with the lists of the values in it: server-side apply refuses two entries of one name, and a mount without
its volume Kubernetes refuses, of a RayCluster only when KubeRay makes the pod. Takes (list component pod). */}}
{{- define "farshore.checkPod" -}}
{{- $component := index . 0 -}}{{- $pod := index . 1 -}}
{{- $volumes := list -}}
{{- range $pod.volumes -}}
{{- if has .name $volumes -}}
{{- fail (printf "%s.extraVolumes: the pod has a volume %s already" $component .name) -}}
{{- end -}}
{{- $volumes = append $volumes .name -}}
{{- end -}}
{{- range $container := concat $pod.initContainers $pod.containers -}}
{{- $names := list -}}
{{- $key := get (dict "launcher" "launcher.extraEnv" "model" "model.init.env") $container.name | default (printf "%s.extraEnv" $component) -}}
{{- range $container.env -}}
{{- if has .name $names -}}
{{- fail (printf "%s: the container has a variable %s already" $key .name) -}}
{{- end -}}
{{- $names = append $names .name -}}
{{- end -}}
{{- $paths := list -}}
{{- range $container.volumeMounts -}}
{{- if has .mountPath $paths -}}
{{- fail (printf "%s.extraVolumeMounts or model.mountPath: the container %s has a mount at %s already" $component $container.name .mountPath) -}}
{{- end -}}
{{- if not (has .name $volumes) -}}
{{- fail (printf "%s.extraVolumeMounts: the pod has no volume %s" $component .name) -}}
{{- end -}}
{{- $paths = append $paths .mountPath -}}
{{- end -}}
{{- end -}}
{{- $spreads := list -}}
{{- range $pod.topologySpreadConstraints -}}
{{- $spread := printf "%s, %s" .topologyKey .whenUnsatisfiable -}}
{{- if has $spread $spreads -}}
{{- fail (printf "%s.topologySpreadConstraints: two have %s" $component $spread) -}}
{{- end -}}
{{- $spreads = append $spreads $spread -}}
{{- end -}}
{{- end }}

{{/* KubeRay takes its finalizer off a RayCluster only while that has gcsFaultToleranceOptions: without them it could
never be removed. */}}
{{- define "farshore.checkRedis" -}}
{{- if and (eq .Values.redis.mode "embedded") (.Capabilities.APIVersions.Has "ray.io/v1/RayCluster") -}}
{{- $name := include "farshore.fullname" . -}}
{{- $old := lookup "ray.io/v1" "RayCluster" .Release.Namespace $name | default dict -}}
{{- if has "ray.io/gcs-ft-redis-cleanup-finalizer" (dig "metadata" "finalizers" list $old) -}}
{{- fail (printf "redis.mode: the RayCluster has its state in Redis, and without Redis KubeRay could not remove it any more: run kubectl -n %s delete raycluster %s, which ends its pods, and then the upgrade" .Release.Namespace $name) -}}
{{- end -}}
{{- end -}}
{{- end }}
