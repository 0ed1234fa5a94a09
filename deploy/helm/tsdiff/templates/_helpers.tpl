{{/* Names are cut where Kubernetes cuts host names. */}}
{{- define "tsdiff.name" -}}
{{- default .Chart.Name .Values.nameOverride | trunc 63 | trimSuffix "-" }}
{{- end }}

{{- define "tsdiff.fullname" -}}
{{- if .Values.fullnameOverride }}
{{- .Values.fullnameOverride | trunc 63 | trimSuffix "-" }}
{{- else if contains (include "tsdiff.name" .) .Release.Name }}
{{- .Release.Name | trunc 63 | trimSuffix "-" }}
{{- else }}
{{- printf "%s-%s" .Release.Name (include "tsdiff.name" .) | trunc 63 | trimSuffix "-" }}
{{- end }}
{{- end }}

{{/* What never changes in the life of a release: it is immutable in a StatefulSet. */}}
{{- define "tsdiff.selectorLabels" -}}
app.kubernetes.io/name: {{ include "tsdiff.name" . }}
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end }}

{{- define "tsdiff.labels" -}}
{{ include "tsdiff.selectorLabels" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version | replace "+" "_" }}
{{- end }}

{{- define "tsdiff.serviceAccountName" -}}
{{- if .Values.serviceAccount.create }}
{{- default (include "tsdiff.fullname" .) .Values.serviceAccount.name }}
{{- else }}
{{- default "default" .Values.serviceAccount.name }}
{{- end }}
{{- end }}

{{/* The port of the metrics, taken from where the settings say that they listen. */}}
{{- define "tsdiff.metricsPort" -}}
{{- $metrics := .Values.config.metrics | default dict }}
{{- $listen := $metrics.listen | default "" }}
{{- $port := regexFind "[0-9]+$" $listen }}
{{- if or (not $port) (hasPrefix "127." $listen) (hasPrefix "localhost" $listen) (hasPrefix "[::1]" $listen) }}
{{- fail (printf "config.metrics.listen must be an address that other pods reach, such as 0.0.0.0:9464, got %q" $listen) }}
{{- end }}
{{- $port }}
{{- end }}

{{/* No privileges at all, for the service and for what fetches its bundle. */}}
{{- define "tsdiff.containerSecurity" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
capabilities: {drop: [ALL]}
{{- end }}
