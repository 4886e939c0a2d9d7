{{/* What the pods have in common. Those that take a component get (list root component). */}}

{{/* Of a component's values: where its pods run, and how long they may take to end. */}}
{{- define "farshore.scheduling" -}}
{{- $pod := index . 2 -}}
terminationGracePeriodSeconds: {{ $pod.terminationGracePeriodSeconds }}
{{- with $pod.priorityClassName }}
priorityClassName: {{ . | quote }}
{{- end }}
{{- with $pod.nodeSelector }}
nodeSelector:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with $pod.tolerations }}
tolerations:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with $pod.affinity }}
affinity:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- if $pod.topologySpreadConstraints }}
topologySpreadConstraints:
{{- range $pod.topologySpreadConstraints }}
  - {{ toYaml . | nindent 4 | trim }}
    labelSelector:
      matchLabels:
        {{- include "farshore.selectorLabels" (list (index $ 0) (index $ 1)) | nindent 8 }}
{{- end }}
{{- end }}
{{- end }}

{{/* Identity and rights of every pod. No pod calls Kubernetes' API, so none gets a token for it. Service links
would set variables such as FARSHORE_PORT, which the program reads as options. */}}
{{- define "farshore.identity" -}}
serviceAccountName: {{ include "farshore.serviceAccountName" . | quote }}
automountServiceAccountToken: false
enableServiceLinks: false
{{- with .Values.image.pullSecrets }}
imagePullSecrets:
  {{- range . }}
  - name: {{ . | quote }}
  {{- end }}
{{- end }}
{{- end }}

{{/* A number of cores as text: KubeRay's CRD takes no fractions such as 0.5 otherwise. */}}
{{- define "farshore.resources" -}}
{{- $all := deepCopy . -}}
{{- range $amounts := $all -}}
{{- if and $amounts (hasKey $amounts "cpu") }}{{ $_ := set $amounts "cpu" (toString $amounts.cpu) }}{{ end -}}
{{- end -}}
{{- toYaml $all -}}
{{- end }}

{{- define "farshore.podSecurity" -}}
runAsNonRoot: true
runAsUser: {{ .Values.security.runAsUser | int64 }}
runAsGroup: {{ .Values.security.runAsGroup | int64 }}
fsGroup: {{ .Values.security.runAsGroup | int64 }}
fsGroupChangePolicy: OnRootMismatch
seccompProfile:
  type: RuntimeDefault
{{- end }}

{{- define "farshore.containerSecurity" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
capabilities:
  drop: [ALL]
{{- end }}

{{/* Copies the token: Kubernetes gives Secrets to a group, and the program refuses a token that a group may
read. */}}
{{- define "farshore.tokenInit" -}}
- name: token
  image: {{ include "farshore.image" . | quote }}
  imagePullPolicy: {{ .Values.image.pullPolicy }}
  command: [install, "-m", "0600", /run/secrets/token/auth_token, /run/farshore/token]
  securityContext:
    {{- include "farshore.containerSecurity" . | nindent 4 }}
  resources:
    {{- include "farshore.resources" .Values.initResources | nindent 4 }}
  volumeMounts:
    - name: token-secret
      mountPath: /run/secrets/token
      readOnly: true
    - name: token
      mountPath: /run/farshore
{{- end }}

{{- define "farshore.volumes" -}}
- name: tmp
  emptyDir: {}
- name: token
  emptyDir:
    medium: Memory
    sizeLimit: 1Mi
- name: token-secret
  secret:
    secretName: {{ include "farshore.tokenSecret" . | quote }}
    defaultMode: 0400
    items:
      - key: auth_token
        path: auth_token
{{- with include "farshore.redisSecret" . }}
- name: redis
  secret:
    secretName: {{ . | quote }}
    defaultMode: 0400
    items:
      - key: {{ $.Values.redis.passwordKey | quote }}
        path: password
{{- end }}
{{- with .Values.redis.external.caSecret }}
- name: redis-ca
  secret:
    secretName: {{ . | quote }}
    items:
      - key: ca.crt
        path: ca.crt
{{- end }}
{{- end }}

{{- define "farshore.volumeMounts" -}}
- name: tmp
  mountPath: /tmp
- name: token
  mountPath: /run/farshore
  readOnly: true
{{- if include "farshore.redisSecret" . }}
- name: redis
  mountPath: /run/secrets/redis
  readOnly: true
{{- end }}
{{- if .Values.redis.external.caSecret }}
- name: redis-ca
  mountPath: /run/secrets/redis-ca
  readOnly: true
{{- end }}
{{- end }}

{{/* /tmp is the only home that a read-only root leaves. */}}
{{- define "farshore.env" -}}
- name: HOME
  value: /tmp
- name: FARSHORE_TOKEN_FILE
  value: /run/farshore/token
{{- end }}
