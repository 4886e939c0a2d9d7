{{/* The pods of the RayCluster: (list root component values). KubeRay composes their `ray start`. */}}

{{/* The settings of controller/launch/ray_settings.py; a test compares them. */}}
{{- define "farshore.rayEnv" -}}
- name: RAY_USAGE_STATS_ENABLED
  value: "0"
- name: RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO
  value: "0"
- name: RAY_worker_niceness
  value: "0"
- name: RAY_memory_monitor_refresh_ms
  value: "0"
- name: RAY_task_events_max_num_task_in_gcs
  value: "1000"
{{- if eq . "head" }}
- name: RAY_health_check_period_ms
  value: "500"
- name: RAY_health_check_timeout_ms
  value: "1000"
- name: RAY_health_check_failure_threshold
  value: "3"
- name: RAY_health_check_initial_delay_ms
  value: "1000"
{{- end }}
{{- end }}

{{/* KubeRay takes only text, reads `resources` as JSON in quotes, and passes it through a shell. */}}
{{- define "farshore.rayStartParams" -}}
{{- $root := index . 0 -}}{{- $component := index . 1 -}}{{- $group := index . 2 -}}
{{- $ports := $root.Values.ray.ports -}}
{{- $takes := dict "farshore" 1 -}}
{{- if ne $component "head" }}{{ $_ := set $takes $component $group.workersPerPod }}{{ end -}}
resources: {{ $takes | toJson | squote | quote }}
object-store-memory: {{ $root.Values.ray.objectStoreBytes | int64 | quote }}
node-manager-port: {{ $ports.nodeManager | quote }}
object-manager-port: {{ $ports.objectManager | quote }}
min-worker-port: {{ $ports.rayWorkers.low | quote }}
max-worker-port: {{ $ports.rayWorkers.high | quote }}
dashboard-agent-listen-port: {{ $ports.agentHttp | quote }}
dashboard-agent-grpc-port: {{ $ports.agentGrpc | quote }}
runtime-env-agent-port: {{ $ports.runtimeEnvAgent | quote }}
metrics-export-port: {{ $ports.metrics | quote }}
{{- if dig "gpu" "enabled" false $group }}
num-gpus: {{ $group.workersPerPod | quote }}
{{- end }}
{{- if eq $component "head" }}
num-cpus: "0"
port: {{ $ports.gcs | quote }}
dashboard-host: 0.0.0.0
dashboard-port: {{ $ports.dashboard | quote }}
ray-client-server-port: {{ $ports.client | quote }}
include-dashboard: {{ $root.Values.head.dashboard | quote }}
{{- end }}
{{- end }}

{{/* Also where KubeRay sets them, after authOptions: an operator older than its CRDs would start an open Ray. */}}
{{- define "farshore.rayAuth" -}}
- name: RAY_AUTH_MODE
  value: token
- name: RAY_AUTH_TOKEN_PATH
  value: /run/farshore/token
{{- end }}

{{- define "farshore.rayProbe" -}}
httpGet:
  path: /api/healthz
  port: {{ .Values.ray.ports.agentHttp }}
timeoutSeconds: 5
{{- end }}

{{- define "farshore.rayPod" -}}
{{- $root := index . 0 -}}{{- $component := index . 1 -}}{{- $group := index . 2 -}}
{{- $image := include "farshore.image" $root -}}
{{- $gpu := dict -}}
{{- if dig "gpu" "enabled" false $group -}}
{{- $gpu = $group.gpu -}}
{{- $image = default $image $gpu.image -}}
{{- $limits := set (deepCopy $group.resources.limits) $gpu.resource $group.workersPerPod -}}
{{- $resources := set (deepCopy $group.resources) "limits" $limits -}}
{{- $tolerations := concat ($group.tolerations | default list) ($gpu.tolerations | default list) -}}
{{- $group = merge (dict "resources" $resources "tolerations" $tolerations) $group -}}
{{- end -}}
metadata:
  labels:
    {{- include "farshore.podLabels" (list $root $component) | nindent 4 }}
  annotations:
    # Another model or format: with upgradeStrategy Recreate, KubeRay replaces the pods.
    farshore/spec: {{ include "farshore.spec" $root | sha256sum | trunc 16 | quote }}
    {{- with $group.podAnnotations }}
    {{- toYaml . | nindent 4 }}
    {{- end }}
spec:
  {{- include "farshore.identity" $root | nindent 2 }}
  {{- include "farshore.scheduling" (list $root $component $group) | nindent 2 }}
  {{- with $gpu.runtimeClassName }}
  runtimeClassName: {{ . | quote }}
  {{- end }}
  securityContext:
    {{- include "farshore.podSecurity" $root | nindent 4 }}
    # Workers listen on any free port: this makes it one of those that the network policy opens.
    sysctls:
      - name: net.ipv4.ip_local_port_range
        value: "{{ $root.Values.ray.ports.workers.low }} {{ $root.Values.ray.ports.workers.high }}"
  {{- if eq $component "head" }}
  # The launcher joins the Ray of its neighbour, which looks after its clients' processes.
  shareProcessNamespace: true
  {{- end }}
  initContainers:
    {{- include "farshore.tokenInit" $root | nindent 4 }}
    {{- with include "farshore.modelInit" (list $root $component) }}
    {{- . | nindent 4 }}
    {{- end }}
  containers:
    - name: ray
      image: {{ $image | quote }}
      imagePullPolicy: {{ $root.Values.image.pullPolicy }}
      env:
        {{- include "farshore.env" $root | nindent 8 }}
        {{- include "farshore.rayAuth" $root | nindent 8 }}
        {{- include "farshore.rayEnv" $component | nindent 8 }}
        {{- if ne $component "head" }}
        # What workers say of where they run. Kubernetes 1.35 labels pods with the zone; before it is empty.
        - name: FARSHORE_NODE
          valueFrom:
            fieldRef:
              fieldPath: spec.nodeName
        - name: FARSHORE_ZONE
          valueFrom:
            fieldRef:
              fieldPath: metadata.labels['topology.kubernetes.io/zone']
        {{- end }}
        {{- if and (eq $component "head") $root.Values.redis.external.caSecret }}
        - name: RAY_REDIS_CA_CERT
          value: /run/secrets/redis-ca/ca.crt
        {{- end }}
        {{- with $group.extraEnv }}
        {{- toYaml . | nindent 8 }}
        {{- end }}
      ports:
        # By its name for PodMonitors: KubeRay would add one, always 8080.
        - name: metrics
          containerPort: {{ $root.Values.ray.ports.metrics }}
        {{- if eq $component "head" }}
        - name: gcs-server
          containerPort: {{ $root.Values.ray.ports.gcs }}
        - name: dashboard
          containerPort: {{ $root.Values.ray.ports.dashboard }}
        {{- end }}
      {{- if ne $component "head" }}
      lifecycle:
        preStop:
          exec:
            command: [farshore, leave, --timeout, {{ sub $group.terminationGracePeriodSeconds 10 | quote }}]
      {{- end }}
      startupProbe:
        {{- include "farshore.rayProbe" $root | nindent 8 }}
        periodSeconds: 5
        failureThreshold: 60
      readinessProbe:
        {{- include "farshore.rayProbe" $root | nindent 8 }}
        periodSeconds: 5
        failureThreshold: 6
      livenessProbe:
        {{- include "farshore.rayProbe" $root | nindent 8 }}
        periodSeconds: 10
        failureThreshold: 12
      securityContext:
        {{- include "farshore.containerSecurity" $root | nindent 8 }}
      resources:
        {{- include "farshore.resources" $group.resources | nindent 8 }}
      volumeMounts:
        {{- include "farshore.volumeMounts" $root | nindent 8 }}
        {{- with include "farshore.modelMount" (list $root $component) }}
        {{- . | nindent 8 }}
        {{- end }}
        {{- include "farshore.rayMounts" $component | nindent 8 }}
        {{- with $group.extraVolumeMounts }}
        {{- toYaml . | nindent 8 }}
        {{- end }}
    {{- if eq $component "head" }}
    {{- include "farshore.launcher" $root | nindent 4 }}
    {{- end }}
  volumes:
    {{- include "farshore.volumes" $root | nindent 4 }}
    {{- with include "farshore.modelVolume" (list $root $component) }}
    {{- . | nindent 4 }}
    {{- end }}
    - name: ray
      emptyDir: {}
    - name: shm
      emptyDir:
        medium: Memory
        sizeLimit: {{ $group.shmSize | quote }}
    {{- if eq $component "head" }}
    - name: state
      emptyDir: {}
    - name: config
      configMap:
        name: {{ include "farshore.fullname" $root | quote }}
    {{- end }}
    {{- with $group.extraVolumes }}
    {{- toYaml . | nindent 4 }}
    {{- end }}
{{- end }}

{{- define "farshore.rayMounts" -}}
- name: ray
  mountPath: /tmp/ray
- name: shm
  mountPath: /dev/shm
{{- if eq . "head" }}
- name: state
  mountPath: /var/lib/farshore
{{- end }}
{{- end }}

{{/* Keeps the controller on the head, and applies the ConfigMap when it changes. */}}
{{- define "farshore.launcher" -}}
- name: launcher
  image: {{ include "farshore.image" . | quote }}
  imagePullPolicy: {{ .Values.image.pullPolicy }}
  command:
    - farshore
    - serve
    - --no-gateway
    - --config=/etc/farshore/cluster.yaml
    - --ray-address=$(POD_IP):{{ .Values.ray.ports.gcs }}
    - --controller-port={{ .Values.launcher.controllerPort }}
    - --state-dir=/var/lib/farshore
  env:
    {{- include "farshore.env" . | nindent 4 }}
    {{- include "farshore.rayAuth" . | nindent 4 }}
    - name: POD_IP
      valueFrom:
        fieldRef:
          fieldPath: status.podIP
    {{- with .Values.launcher.extraEnv }}
    {{- toYaml . | nindent 4 }}
    {{- end }}
  ports:
    - name: controller
      containerPort: {{ .Values.launcher.controllerPort }}
  readinessProbe:
    grpc:
      port: {{ .Values.launcher.controllerPort }}
    periodSeconds: 5
    failureThreshold: 6
  securityContext:
    {{- include "farshore.containerSecurity" . | nindent 4 }}
  resources:
    {{- include "farshore.resources" .Values.launcher.resources | nindent 4 }}
  volumeMounts:
    {{- include "farshore.volumeMounts" . | nindent 4 }}
    {{- with include "farshore.modelMount" (list . "head") }}
    {{- . | nindent 4 }}
    {{- end }}
    {{- include "farshore.rayMounts" "head" | nindent 4 }}
    - name: config
      mountPath: /etc/farshore
      readOnly: true
{{- end }}
