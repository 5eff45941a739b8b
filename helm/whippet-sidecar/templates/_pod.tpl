{{/* What goes into a pod. */}}

{{/* The relay in `initContainers`, where Kubernetes knows sidecars; else nothing. */}}
{{- define "whippet.sidecar" -}}
{{- if include "whippet.isNative" . }}{{ include "whippet.anyContainer" . }}{{ end }}
{{- end }}

{{/* The relay in `containers`, where the above is nothing. */}}
{{- define "whippet.container" -}}
{{- if not (include "whippet.isNative" .) }}{{ include "whippet.anyContainer" . }}{{ end }}
{{- end }}

{{- define "whippet.anyContainer" -}}
{{- $whippet := .Values.whippet -}}
- name: whippet
  image: {{ include "whippet.image" . | quote }}
  imagePullPolicy: {{ $whippet.image.pullPolicy }}
  {{- if include "whippet.isNative" . }}
  restartPolicy: Always
  {{- end }}
  args: [run, --config, /etc/whippet/whippet.yaml]
  {{- with $whippet.env }}
  env: {{- toYaml . | nindent 4 }}
  {{- end }}
  ports:
    - { name: whippet-admin, containerPort: {{ include "whippet.adminPort" . }}, protocol: TCP }
    {{- with include "whippet.ingestPort" . }}
    - { name: whippet-ingest, containerPort: {{ . }}, protocol: TCP }
    {{- end }}
  livenessProbe:
    httpGet: { path: /livez, port: whippet-admin }
    {{- toYaml $whippet.probes.liveness | nindent 4 }}
  {{- with $whippet.probes.readiness }}
  readinessProbe:
    httpGet: { path: /readyz, port: whippet-admin }
    {{- toYaml . | nindent 4 }}
  {{- end }}
  resources: {{- toYaml $whippet.resources | nindent 4 }}
  securityContext:
    runAsNonRoot: true
    runAsUser: 65532
    runAsGroup: 65532
    readOnlyRootFilesystem: true
    allowPrivilegeEscalation: false
    capabilities: { drop: [ALL] }
    seccompProfile: { type: RuntimeDefault }
  terminationMessagePolicy: FallbackToLogsOnError
  volumeMounts:
    # Folders and never subPath: what is mounted by that is not updated.
    - { name: whippet-config, mountPath: /etc/whippet, readOnly: true }
    {{- range $name, $_ := $whippet.secrets }}
    - { name: whippet-secret-{{ $name }}, mountPath: /run/secrets/{{ $name }}, readOnly: true }
    {{- end }}
    {{- with $whippet.config.ingest }}
    - { name: whippet-spool, mountPath: {{ required "config.ingest.spool: a folder that outlives the process" .spool | quote }} }
    {{- end }}
    {{- with $whippet.extraVolumeMounts }}
    {{- toYaml . | nindent 4 }}
    {{- end }}
{{- end }}

{{/* In `volumes`. The spool's is not among them where a StatefulSet makes its claims. */}}
{{- define "whippet.volumes" -}}
{{- $whippet := .Values.whippet -}}
- name: whippet-config
  configMap: { name: {{ include "whippet.fullname" . }} }
{{- range $name, $secret := $whippet.secrets }}
- name: whippet-secret-{{ $name }}
  secret: {{- toYaml (merge (dict "defaultMode" 0444) $secret) | nindent 4 }}
{{- end }}
{{- if and $whippet.config.ingest $whippet.spool.existingClaim }}
- name: whippet-spool
  persistentVolumeClaim: { claimName: {{ $whippet.spool.existingClaim }} }
{{- end }}
{{- with $whippet.extraVolumes }}
{{ toYaml . }}
{{- end }}
{{- end }}

{{/* In `volumeClaimTemplates` of a StatefulSet whose relay takes events by HTTP. */}}
{{- define "whippet.volumeClaimTemplates" -}}
{{- $whippet := .Values.whippet -}}
{{- if and $whippet.config.ingest (not $whippet.spool.existingClaim) -}}
- metadata:
    name: whippet-spool
  spec:
    accessModes: [ReadWriteOnce]
    {{- with $whippet.spool.storageClassName }}
    storageClassName: {{ . }}
    {{- end }}
    resources: { requests: { storage: {{ $whippet.spool.size }} } }
{{- end }}
{{- end }}
