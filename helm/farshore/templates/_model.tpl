{{/* The model's files, for pods that read them: the head, the dense group and the gateways. An attention worker
holds KV and reads no model: its node needs no copy, and a claim of another zone would keep it from starting. Each
takes (list root component). */}}

{{/* image: nothing is to be mounted. */}}
{{- define "farshore.modelSource" -}}
{{- ternary "image" (index . 0).Values.model.source (eq (index . 1) "attention") -}}
{{- end }}

{{- define "farshore.modelInit" -}}
{{- $values := (index . 0).Values -}}
{{- if eq (include "farshore.modelSource" .) "init" -}}
- name: model
  image: {{ $values.model.init.image | quote }}
  command: {{ toJson $values.model.init.command }}
  {{- with $values.model.init.env }}
  env:
    {{- toYaml . | nindent 4 }}
  {{- end }}
  securityContext:
    {{- include "farshore.containerSecurity" . | nindent 4 }}
  resources:
    {{- include "farshore.resources" $values.model.init.resources | nindent 4 }}
  volumeMounts:
    - name: model
      mountPath: {{ $values.model.mountPath | quote }}
    - name: tmp
      mountPath: /tmp
{{- end }}
{{- end }}

{{- define "farshore.modelVolume" -}}
{{- $model := (index . 0).Values.model -}}
{{- $source := include "farshore.modelSource" . -}}
{{- if eq $source "pvc" -}}
- name: model
  persistentVolumeClaim:
    claimName: {{ $model.pvc.claimName | quote }}
    readOnly: true
{{- else if eq $source "hostPath" -}}
- name: model
  hostPath:
    path: {{ $model.hostPath.path | quote }}
    type: Directory
{{- else if eq $source "init" -}}
- name: model
  emptyDir:
    sizeLimit: {{ $model.init.sizeLimit | quote }}
{{- end }}
{{- end }}

{{- define "farshore.modelMount" -}}
{{- if ne (include "farshore.modelSource" .) "image" -}}
- name: model
  mountPath: {{ (index . 0).Values.model.mountPath | quote }}
  readOnly: true
{{- end }}
{{- end }}
