{{/* The cluster's configuration, the addresses of its directory, and checks that a schema cannot express. */}}

{{/* Without the numbers of workers: its checksum tells whether pods must be replaced. */}}
{{- define "farshore.spec" -}}
name: {{ include "farshore.fullname" . }}
{{- range $key, $value := .Values.spec }}
{{- if not (kindIs "invalid" $value) }}
{{ kebabcase $key }}: {{ toJson $value }}
{{- end }}
{{- end }}
{{- if .Values.dense.gpu.enabled }}
device: cuda
{{- end }}
{{- if .Values.attention.gpu.enabled }}
attention-device: cuda
{{- end }}
{{- if ne .Values.redis.mode "embedded" }}
redis-url: {{ include "farshore.redisUrl" . }}
{{- if include "farshore.redisSecret" . }}
redis-password-file: /run/secrets/redis/password
{{- end }}
{{- if .Values.redis.external.caSecret }}
redis-ca-file: /run/secrets/redis-ca/ca.crt
{{- end }}
{{- end }}
{{- end }}

{{- define "farshore.redisUrl" -}}
{{- if eq .Values.redis.mode "bundled" -}}
redis://{{ include "farshore.fullname" . }}-redis:6379/0
{{- else -}}
{{ .Values.redis.external.url }}
{{- end -}}
{{- end }}

{{/* The Secret with Redis's password; empty: Redis asks for none. */}}
{{- define "farshore.redisSecret" -}}
{{- if eq .Values.redis.mode "bundled" -}}
{{ default (printf "%s-redis" (include "farshore.fullname" .)) .Values.redis.bundled.existingSecret }}
{{- else if eq .Values.redis.mode "external" -}}
{{ .Values.redis.external.passwordSecret }}
{{- end -}}
{{- end }}

{{- define "farshore.redisPort" -}}
{{- if eq .Values.redis.mode "bundled" -}}
6379
{{- else -}}
{{- $host := (urlParse .Values.redis.external.url).host -}}
{{- regexFind ":[0-9]+$" $host | trimPrefix ":" | default "6379" -}}
{{- end -}}
{{- end }}

{{/* What gateways get as --directory. It names files, and carries no secret. */}}
{{- define "farshore.directoryUrl" -}}
{{- if eq .Values.redis.mode "embedded" -}}
grpc://{{ include "farshore.controllerAddress" . }}
{{- else -}}
{{- $url := include "farshore.redisUrl" . -}}
{{- $url -}}?cluster={{ include "farshore.fullname" . }}
{{- if include "farshore.redisSecret" . }}&password_file={{ urlquery "/run/secrets/redis/password" }}{{ end }}
{{- if .Values.redis.external.caSecret }}&ca_file={{ urlquery "/run/secrets/redis-ca/ca.crt" }}{{ end }}
{{- end -}}
{{- end }}

{{/* A size such as 512MiB, 4Gi or 4G in bytes: units with an i are powers of 1024. */}}
{{- define "farshore.bytes" -}}
{{- $number := regexFind "^[0-9.]+" . | float64 -}}
{{- $unit := regexFind "[A-Za-z]+$" . | lower | trimSuffix "b" -}}
{{- $power := index (dict "" 0 "k" 1 "m" 2 "g" 3 "t" 4) (trimSuffix "i" $unit) -}}
{{- range until (int $power) }}{{ $number = mulf $number (ternary 1024.0 1000.0 (hasSuffix "i" $unit)) }}{{ end -}}
{{- $number | int64 -}}
{{- end }}

{{- define "farshore.check" -}}
{{- $name := include "farshore.fullname" . -}}
{{- if not (regexMatch "^[a-z]([a-z0-9-]*[a-z0-9])?$" $name) -}}
{{- fail (printf "%s is no name of a Service: set fullnameOverride to one that begins with a letter" $name) -}}
{{- end -}}
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
{{- $grace := .Values.gateway.terminationGracePeriodSeconds -}}
{{- if le (float64 $grace) (addf .Values.gateway.preStopSeconds .Values.gateway.drainTimeout) -}}
{{- fail (printf "gateway.terminationGracePeriodSeconds: %v must be more than preStopSeconds and drainTimeout together, or a drain is cut off" $grace) -}}
{{- end -}}
{{- end }}
