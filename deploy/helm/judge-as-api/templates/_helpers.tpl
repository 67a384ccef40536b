{{- define "judge.name" -}}
{{- contains "judge" .Release.Name | ternary .Release.Name (printf "%s-%s" .Release.Name .Chart.Name) | trunc 50 | trimSuffix "-" }}
{{- end }}

{{- define "judge.selector" -}}
app.kubernetes.io/name: {{ .root.Chart.Name }}
app.kubernetes.io/instance: {{ .root.Release.Name }}
app.kubernetes.io/component: {{ .component }}
{{- end }}

{{- define "judge.labels" -}}
{{ include "judge.selector" . }}
app.kubernetes.io/version: {{ .root.Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .root.Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .root.Chart.Name .root.Chart.Version }}
{{- end }}

{{/* Pods change with the settings and files that they were started with. */}}
{{- define "judge.podAnnotations" -}}
checksum/config: {{ include (print .Template.BasePath "/config.yaml") . | sha256sum }}
{{- end }}

{{- define "judge.podSecurity" -}}
runAsNonRoot: true
runAsUser: 1000
runAsGroup: 1000
fsGroup: 1000
fsGroupChangePolicy: OnRootMismatch
seccompProfile: {type: RuntimeDefault}
{{- end }}

{{- define "judge.containerSecurity" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
capabilities: {drop: [ALL]}
{{- end }}

{{/* Settings of both programs, then those of one. Later ones win. */}}
{{- define "judge.env" -}}
{{- $settings := merge (dict) .settings .root.Values.settings }}
{{- $queue := printf "redis://%s-redis:6379/0" (include "judge.name" .root) }}
{{- if .root.Values.redis.enabled }}{{ $_ := set $settings "JUDGE_QUEUE_URL" $queue }}{{ end }}
{{- if and (not .root.Values.redis.enabled) (not (hasKey $settings "JUDGE_QUEUE_URL")) }}{{ fail "redis.enabled is false: set settings.JUDGE_QUEUE_URL to a Redis of your own" }}{{ end }}
{{- range $name, $value := $settings }}
- {name: {{ $name }}, value: {{ kindIs "float64" $value | ternary ($value | toJson) ($value | toString) | quote }}}
{{- end }}
{{- with .root.Values.secret }}
{{- if and .name .queuePassword }}
- {name: JUDGE_QUEUE_PASSWORD_FILE, value: /secrets/queue-password}
{{- end }}
{{- if and .name .upstreamApiKey }}
- {name: JUDGE_UPSTREAM_API_KEY_FILE, value: /secrets/upstream-api-key}
{{- end }}
{{- end }}
# The model's files are in the volume: nobody asks the hub again.
- {name: HF_HUB_OFFLINE, value: "1"}
{{- end }}

{{- define "judge.mounts" -}}
- {name: tmp, mountPath: /tmp}
- {name: models, mountPath: /models, readOnly: true}
- {name: files, mountPath: /files, readOnly: true}
{{- if .secrets }}
- {name: secrets, mountPath: /secrets, readOnly: true}
{{- end }}
{{- end }}

{{- define "judge.volumes" -}}
# Compiled kernels are loaded from /tmp.
- {name: tmp, emptyDir: {}}
- name: files
  configMap: {name: {{ include "judge.name" .root }}-files}
- name: models
{{- if .root.Values.models.persistence }}
  persistentVolumeClaim: {claimName: {{ .root.Values.models.claimName | default (printf "%s-models" (include "judge.name" .root)) }}}
{{- else }}
  emptyDir: {}
{{- end }}
{{- if .secrets }}
- name: secrets
  secret:
    secretName: {{ .root.Values.secret.name }}
    # Group-readable: pods do not run as root.
    defaultMode: 0440
    items:
    {{- range .secrets }}
    - {key: {{ . }}, path: {{ . }}}
    {{- end }}
{{- end }}
{{- end }}

{{/* Which keys of the Secret the pods of a component see, as a YAML list. */}}
{{- define "judge.secrets" -}}
{{- $keys := list }}
{{- with .root.Values.secret }}
{{- if .name }}
{{- if and .apiKeys (eq $.component "api") }}{{ $keys = append $keys "api-keys" }}{{ end }}
{{- if .queuePassword }}{{ $keys = append $keys "queue-password" }}{{ end }}
{{- if .upstreamApiKey }}{{ $keys = append $keys "upstream-api-key" }}{{ end }}
{{- end }}
{{- end }}
{{- $keys | toYaml }}
{{- end }}

{{/* Fetches the model into the volume; ends at once where it is there. Upstream judges may need no files. */}}
{{- define "judge.fetch" -}}
- name: model
  image: {{ .Values.images.workerCpu | quote }}
  imagePullPolicy: {{ .Values.images.pullPolicy }}
  command: [python, -m, service.models, fetch, --quiet, {{ required "settings.JUDGE_MODEL names the model" .Values.settings.JUDGE_MODEL | quote }}]
  {{- if and .Values.secret.name .Values.secret.hfToken }}
  env:
  - name: HF_TOKEN
    valueFrom: {secretKeyRef: {name: {{ .Values.secret.name }}, key: hf-token}}
  {{- end }}
  securityContext: {{- include "judge.containerSecurity" . | nindent 4 }}
  resources:
    requests: {cpu: 500m, memory: 2Gi}
    limits: {memory: 8Gi}
  volumeMounts:
  - {name: tmp, mountPath: /tmp}
  - {name: models, mountPath: /models}
{{- end }}
