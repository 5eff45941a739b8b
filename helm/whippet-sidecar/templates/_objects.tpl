{{/* What stands beside a pod: its configuration, and who looks at it. */}}
{{- define "whippet.objects" -}}
{{- $whippet := .Values.whippet -}}
---
apiVersion: v1
kind: ConfigMap
metadata:
  name: {{ include "whippet.fullname" . }}
  labels: {{- include "whippet.labels" . | nindent 4 }}
data:
  whippet.yaml: |
    {{- include "whippet.config" . | nindent 4 }}
{{- if include "whippet.isWanted" (list . $whippet.podMonitor.enabled) }}
---
apiVersion: monitoring.coreos.com/v1
kind: PodMonitor
metadata:
  name: {{ include "whippet.fullname" . }}
  labels: {{- merge (deepCopy $whippet.podMonitor.labels) (include "whippet.labels" . | fromYaml) | toYaml | nindent 4 }}
spec:
  selector:
    matchLabels: {{- $whippet.podSelector | default (dict "app.kubernetes.io/instance" .Release.Name) | toYaml | nindent 6 }}
  podMetricsEndpoints:
    - port: whippet-admin
      path: /metrics
      interval: {{ $whippet.podMonitor.interval }}
{{- end }}
{{- if include "whippet.isWanted" (list . $whippet.prometheusRule.enabled) }}
---
apiVersion: monitoring.coreos.com/v1
kind: PrometheusRule
metadata:
  name: {{ include "whippet.fullname" . }}
  labels: {{- merge (deepCopy $whippet.prometheusRule.labels) (include "whippet.labels" . | fromYaml) | toYaml | nindent 4 }}
spec:
  groups: {{- include "whippet.ruleGroups" . | trim | nindent 4 }}
{{- end }}
{{- if $whippet.dashboard.enabled }}
---
apiVersion: v1
kind: ConfigMap
metadata:
  name: {{ include "whippet.fullname" . }}-dashboard
  labels: {{- merge (deepCopy $whippet.dashboard.labels) (include "whippet.labels" . | fromYaml) | toYaml | nindent 4 }}
data:
  whippet.json: |
    {{- .Subcharts.whippet.Files.Get "files/dashboard.json" | nindent 4 }}
{{- end }}
{{- end }}

{{/* files/whippet.rules.yaml, as the values want it. */}}
{{- define "whippet.ruleGroups" -}}
{{- $rule := .Values.whippet.prometheusRule }}
{{- range (.Subcharts.whippet.Files.Get "files/whippet.rules.yaml" | fromYaml).groups }}
- name: {{ .name }}
  rules:
  {{- range .rules }}
  {{- if not (has .alert $rule.disabled) }}
    {{- $_ := set . "labels" (merge (deepCopy $rule.ruleLabels) .labels) }}
    {{- if $rule.runbookUrl }}
      {{- $_ := set .annotations "runbook_url" (.annotations.runbook_url | replace "docs/runbooks" (trimSuffix "/" $rule.runbookUrl)) }}
    {{- end }}
    {{- list . | toYaml | nindent 4 }}
  {{- end }}
  {{- end }}
{{- end }}
{{- end }}
