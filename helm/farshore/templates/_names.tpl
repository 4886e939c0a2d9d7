{{/* Names and labels. Selectors hold what never changes between upgrades; versions are in labels only. */}}

{{- define "farshore.name" -}}
{{- default .Chart.Name .Values.nameOverride -}}
{{- end }}

{{/* At most 40 characters: a cluster's name in Farshore, and room for suffixes in KubeRay's. */}}
{{- define "farshore.fullname" -}}
{{- $name := .Release.Name -}}
{{- if .Values.fullnameOverride -}}
{{- $name = .Values.fullnameOverride -}}
{{- else if not (contains (include "farshore.name" .) .Release.Name) -}}
{{- $name = printf "%s-%s" .Release.Name (include "farshore.name" .) -}}
{{- end -}}
{{- $name = $name | replace "." "-" -}}
{{- if gt (len $name) 40 -}}
{{- $name = printf "%s-%s" ($name | trunc 31 | trimSuffix "-") (sha256sum $name | trunc 8) -}}
{{- end -}}
{{- $name -}}
{{- end }}

{{/* Takes (list root component). */}}
{{- define "farshore.selectorLabels" -}}
{{- $root := index . 0 -}}
app.kubernetes.io/name: {{ include "farshore.name" $root | quote }}
app.kubernetes.io/instance: {{ $root.Release.Name | quote }}
app.kubernetes.io/component: {{ index . 1 }}
{{- end }}

{{/* The labels of pods: no versions, so that an upgrade of the chart alone restarts nothing. */}}
{{- define "farshore.podLabels" -}}
{{- $selector := include "farshore.selectorLabels" . | fromYaml -}}
{{- $root := index . 0 -}}
{{- $part := dict "app.kubernetes.io/part-of" "farshore" -}}
{{- toYaml (merge $selector $part ($root.Values.commonLabels | default dict)) -}}
{{- end }}

{{/* The labels of objects. */}}
{{- define "farshore.labels" -}}
{{- $root := index . 0 -}}
{{- $version := dict
  "app.kubernetes.io/version" (default $root.Chart.AppVersion $root.Values.image.tag | trunc 63 | regexFind "[A-Za-z0-9](.*[A-Za-z0-9])?")
  "app.kubernetes.io/managed-by" $root.Release.Service
  "helm.sh/chart" (printf "%s-%s" $root.Chart.Name $root.Chart.Version | replace "+" "_" | trunc 63) -}}
{{- toYaml (merge (include "farshore.podLabels" . | fromYaml) $version) -}}
{{- end }}

{{- define "farshore.image" -}}
{{ .Values.image.repository }}:{{ default .Chart.AppVersion .Values.image.tag }}
{{- end }}

{{- define "farshore.serviceAccountName" -}}
{{- if .Values.serviceAccount.create -}}
{{- default (include "farshore.fullname" .) .Values.serviceAccount.name -}}
{{- else -}}
{{- default "default" .Values.serviceAccount.name -}}
{{- end -}}
{{- end }}

{{- define "farshore.tokenSecret" -}}
{{- default (printf "%s-token" (include "farshore.fullname" .)) .Values.token.existingSecret -}}
{{- end }}

{{- define "farshore.controllerAddress" -}}
{{ include "farshore.fullname" . }}-controller:{{ .Values.launcher.controllerPort }}
{{- end }}

{{/* Kinds that the values enable, by their plural names. */}}
{{- define "farshore.optionalKinds" -}}
{{- $kinds := list -}}
{{- if .Values.gateway.autoscaling.enabled }}{{ $kinds = append $kinds "horizontalpodautoscalers" }}{{ end -}}
{{- if or .Values.ingress.grpc.enabled .Values.ingress.http.enabled }}{{ $kinds = append $kinds "ingresses" }}{{ end -}}
{{- join " " $kinds -}}
{{- end }}
