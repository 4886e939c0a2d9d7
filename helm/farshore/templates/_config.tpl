{{/* The cluster's configuration, and the addresses of its directory. */}}

{{/* Without the numbers of workers: its checksum tells whether pods must be replaced. */}}
{{- define "farshore.spec" -}}
name: {{ include "farshore.fullname" . | quote }}
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
{{ .Values.redis.external.passwordSecret | default "" }}
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
